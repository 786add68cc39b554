"""The commands of launch/README.md, run as they stand there, but with smaller numbers."""

import re
import subprocess
import sys
from pathlib import Path

from cluster.cluster import REPOSITORY, SYSTEM_PATH, Cluster
from pretraining import MODEL

README = REPOSITORY / "launch/README.md"
NUMBERS = {"1000": "80", "1250": "90", "1500": "100", "1750": "110", "250": "10", "60": "2"}
COMMANDS = [
    line
    for block in re.findall(r"^```\n(.*?)^```$", README.read_text(), flags=re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]


def the_command(words: str) -> str:
    """The one that holds these words."""
    (found,) = [command for command in COMMANDS if words in command]
    return re.sub(r"\b\d+\b", lambda match: NUMBERS.get(match[0], match[0]), found)


def do_as_readme(
    cluster: Cluster, words: str, *, run: Path, data: Path, options: tuple[str | Path, ...] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs the command that holds `words` on the head; `options` are for its sbatch."""
    paths = [REPOSITORY / "tests/launch/bin", Path(sys.executable).parent, SYSTEM_PATH]
    environment |= {"RUN": str(run), "DATA": str(data), "MODEL": " ".join(MODEL), "PATH": ":".join(map(str, paths))}
    environment |= {"TEST_SBATCH_OPTIONS": "\n".join(map(str, options)), "PYTHONPATH": str(REPOSITORY)}
    return cluster.run("head", "bash", "-c", the_command(words), timeout_s=240, **environment)  # type: ignore[arg-type]
