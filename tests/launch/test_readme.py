"""Nothing stands in launch/README.md that no test runs."""

import re
from pathlib import Path

from cluster.cluster import REPOSITORY, Cluster
from readme import COMMANDS, the_command

HERE = Path(__file__).parent


def test_every_command_of_the_readme_is_run_by_a_test() -> None:
    tests = "".join(path.read_text() for path in HERE.glob("*.py"))
    asked_for = re.findall(r"""as_readme\(\s*(?:\w+,\s*)?(["'])(.+?)\1[,)]""", tests)
    run = {the_command(words) for _, words in asked_for}
    export = "export WSM_SITE=$HOME/cluster.env"  # every other command here runs in such an environment
    assert {the_command(command) for command in COMMANDS if command != export} == run


def test_the_site_file_of_the_repository_names_all_that_the_scripts_use(cluster: Cluster) -> None:
    scripts = "".join(path.read_text() for path in (REPOSITORY / "launch").rglob("*.s*") if path.is_file())
    used = set(re.findall(r"WSM_[A-Z_]+", scripts)) - {"WSM_REPO", "WSM_SITE", "WSM_ATTEMPT"}
    site = REPOSITORY / "configs/cluster.env"
    named = cluster.run("head", "bash", "-c", f"set -aeu; source {site}; env", WSM_REPO=str(REPOSITORY)).stdout
    assert used == set(re.findall(r"^(WSM_[A-Z_]+)=", named, flags=re.MULTILINE)) - {"WSM_REPO"}
