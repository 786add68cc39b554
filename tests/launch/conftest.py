"""The cluster on which the launch scripts run, one a test session, and the site's file that they read there."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster.cluster import REPOSITORY, Cluster, why_not
from pretraining import SECRET, SMALL_JOB, UNTIL, Run, site_with
from readme import do_as_readme

SITE = """
WSM_PYTHON={python}
PYTHONPATH={repository}
DS_ACCELERATOR=cpu
OMP_NUM_THREADS=1
WSM_RANKS_PER_NODE=2
WSM_AGENT=torchrun
WSM_START_S=120
WSM_HANG_S=120
WSM_COLLECTIVE_S=120
WSM_SAVE_S=20
WSM_CHECK_S=60
WSM_FREE_BYTES=1MiB
WSM_MAX_CRASHES=2
WSM_LOCAL=/tmp
PYTHONFAULTHANDLER=1
PYTHONUNBUFFERED=1
HF_HUB_OFFLINE=1
HF_TOKEN=$'{secret}\n"$HOME" %h'
"""


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """head and n1, n2, n3; they share the repository, Python and pytest's folders.

    Where none can run the tests are skipped, with the reason; in CI they fail.
    """
    reason = why_not()
    if reason and os.environ.get("CI") == "true":
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)
    with Cluster(shared=[tmp_path_factory.getbasetemp()]) as running:
        yield running


@pytest.fixture(scope="module", autouse=True)
def nothing_goes_on(cluster: Cluster) -> Iterator[None]:
    """Jobs that a failed test has left would slow down, or fail, all that comes after."""
    yield
    cluster.run("head", "scancel", "--user=root")


@pytest.fixture
def idle_cluster(cluster: Cluster) -> Cluster:
    """The cluster, with all its hosts free."""
    cluster.wait_until_idle()
    return cluster


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which a user of this site submits."""
    path = tmp_path_factory.mktemp('the site\'s "own" files') / "cluster.env"
    path.write_text(SITE.format(python=sys.executable, repository=REPOSITORY, secret=SECRET))
    return {"WSM_SITE": str(path)}


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text to learn: some of this repository's own."""
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_bytes(b"".join(file.read_bytes() for file in sorted((REPOSITORY / "wsm_ds").glob("*.py"))))
    return path


@pytest.fixture(scope="session")
def uninterrupted(
    cluster: Cluster, site: dict[str, str], data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, Run]:
    """By stage: ZeRO-2 through pdsh, and beside it ZeRO-3 through `deepspeed --launcher slurm`; two hosts each."""
    folder = tmp_path_factory.mktemp('it\'s "uninterrupted"')
    names = {2: "zero 2", 3: "zero 3"}
    options = ("--output", folder / "%x-%j.out", *SMALL_JOB)
    with_deepspeed = site_with(site, folder, WSM_AGENT="deepspeed")
    submitted = do_as_readme(cluster, "slurm/pretrain.sbatch", run=folder / names[3], data=data, options=options,
                             **with_deepspeed)  # fmt: skip
    do_as_readme(cluster, "pdsh/pretrain.sh", run=folder / names[2], data=data, **site)
    runs = {2: Run(folder / f"{names[2]}-pdsh", data, 2), 3: Run(folder / names[3], data, 3)}
    job = cluster.wait(submitted.stdout.strip(), timeout_s=180)
    assert job["JobState"] == "COMPLETED", runs[3].what_happened()
    assert [run.done for run in runs.values()] == [UNTIL, UNTIL]
    return runs
