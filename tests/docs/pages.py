"""The README and the pages of docs/: their fenced blocks, and what has to be changed in them for a tiny run."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
GENERATED = {DOCS / "cli.md", DOCS / "api.md"}
"""Made from the code: their blocks are signatures."""
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", flags=re.MULTILINE | re.DOTALL)

WINDOWS = {"16": "3", "8": "2", "4": "1"}
"""Numbers of checkpoints: the run of the tests has three."""
STEPS = {"1400": "4", "1600": "6"}
"""Steps: the run of the tests has 2, 4 and 6."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    language: str
    text: str

    @property
    def commands(self) -> list[str]:
        """The commands of a block for a shell, without comments; a line that ends in a backslash goes on."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [" ".join(line.split()) for text in lines if (line := re.sub(r"(^|\s)# .*$", "", text).strip())]


def blocks(page: Path, *languages: str) -> list[Block]:
    """The blocks of a page in some languages, in order."""
    found = [Block(page, match[2], match[3]) for match in FENCE.finditer(page.read_text(encoding="utf-8"))]
    return [block for block in found if block.language in languages] if languages else found


def for_the_tiny_run(command: str) -> str:
    """The same command with windows and steps that the tests' run has, and two processes."""

    def numbers(values: str, table: dict[str, str]) -> str:
        return re.sub(r"\d+", lambda match: table.get(match[0], match[0]), values)

    windows = r"(?<=--last )[\d,]+|(?<=--windows )[\d,]+|(?<=\blast=)\d+"
    command = re.sub(windows, lambda match: numbers(match[0], WINDOWS), command)
    command = re.sub(r"(?<=--nproc-per-node )4", "2", command)
    steps = r"(?:--from|--to|--until-step) [\d,]+|global_step\d+"
    return re.sub(steps, lambda match: numbers(match[0], STEPS), command)
