"""What holds without running a job: shellcheck, sbatch's own check, and requests that no job could serve."""

import subprocess
from pathlib import Path

import pytest
from cluster.cluster import REPOSITORY, Cluster

SCRIPTS = sorted(
    path.relative_to(REPOSITORY)
    for pattern in ("launch/**/*.sh", "launch/**/*.sbatch", "tests/cluster/*.sh", "configs/*.env")
    for path in REPOSITORY.glob(pattern)
)
TEMPLATES = [path for path in SCRIPTS if path.suffix == ".sbatch"]


def test_shellcheck_finds_nothing(cluster: Cluster) -> None:
    assert len(SCRIPTS) >= 10
    command = [
        "shellcheck",
        "--external-sources",
        "--source-path=SCRIPTDIR",
        "--source-path=.",
        ".ci/run",
        *map(str, SCRIPTS),
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_slurm_accepts_what_a_template_asks_for(cluster: Cluster, template: Path) -> None:
    done = cluster.run("head", "sbatch", "--test-only", template)
    assert "to start at" in done.stderr


def test_a_chain_that_no_job_could_serve_submits_nothing(cluster: Cluster, tmp_path: Path) -> None:
    run = ["--run", tmp_path / "run"]
    for arguments, message in (
        ([], "launch/slurm/chain.sh 10000,20000,30000"),
        (["10,twenty", "--", *run], "--until-step is missing, or not a number: 'twenty'"),
        (["10", "--nodes=2", "--", "--config", "c"], "--run is missing"),
    ):
        done = cluster.run("head", "launch/slurm/chain.sh", *arguments, check=False)
        assert done.returncode != 0
        assert message in done.stdout + done.stderr
    assert cluster.run("head", "squeue", "-h").stdout == ""


def test_a_missing_site_an_odd_host_and_a_wrong_folder_are_named(
    cluster: Cluster, site: dict[str, str], tmp_path: Path
) -> None:
    arguments = [str(tmp_path / "hosts"), "--run", str(tmp_path / "run"), "--until-step", "1"]
    (tmp_path / "hosts").write_text("n1 slots=1\n")
    done = cluster.run("head", "launch/pdsh/pretrain.sh", *arguments, check=False, WSM_SITE="/no/such/site")
    assert (done.returncode, "the site's file /no/such/site cannot be read" in done.stderr) == (1, True)
    (tmp_path / "hosts").write_text("n1 slots=1\n$(touch$IFS/made) slots=1\n")
    done = cluster.run("head", "launch/pdsh/pretrain.sh", *arguments, check=False, WSM_SITE=site["WSM_SITE"])
    assert (done.returncode, "hosts: '$(touch$IFS/made)' is not a host's name" in done.stderr) == (1, True)
    output = tmp_path / "merge.out"
    job = cluster.submit("--output", output, "--mem-per-cpu=100", "--ntasks-per-node=1",
                         REPOSITORY / "launch/slurm/merge.sbatch", "RUN", cwd=Path("/"))  # fmt: skip
    cluster.wait(job, "FAILED")
    assert "submit from the repository's folder" in output.read_text()
