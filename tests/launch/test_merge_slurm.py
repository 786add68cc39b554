"""Merges as Slurm jobs: the bytes of one process, on two hosts, and by an array."""

from pathlib import Path

from cluster.cluster import Cluster
from pretraining import Run
from readme import do_as_readme

from wsm_ds.layouts.frameworks import MANIFEST
from wsm_ds.merging import merge


def contents(out: Path) -> dict[str, bytes]:
    """All files but the manifest, which knows when it was made."""
    files = [path for path in out.rglob("*") if path.is_file() and path.name != MANIFEST]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in files}


def test_two_hosts_and_an_array_make_what_one_process_makes(
    idle_cluster: Cluster, site: dict[str, str], uninterrupted: dict[int, Run], tmp_path: Path
) -> None:
    here = tmp_path / 'it\'s "here"'
    here.mkdir()
    (here / "run").symlink_to(uninterrupted[3].folder)
    of_run = {"run": here / "run", "data": Path(), "options": ("--output", here / "%x-%j.out"), **site}
    job = do_as_readme(idle_cluster, "slurm/merge.sbatch", **of_run).stdout.strip()
    array = do_as_readme(idle_cluster, "slurm/merge_array.sbatch", **of_run).stdout.strip()
    for name in (job, *(f"{array}_{task}" for task in range(4))):
        idle_cluster.wait(name, "COMPLETED")
    for last in (2, 4):
        for curve in ("linear", "1-sqrt"):
            name = f"last{last}-{curve}"
            merge(run=here / "run", last=last, curve=curve, out=tmp_path / name)
            made = contents(tmp_path / name)
            assert len(made) >= 9
            assert contents(here / "run-sweep" / name) == contents(here / "run-array" / name) == made
    said = (here / f"merge-{job}.out").read_text()
    assert said.count("done ") == 4
    assert "rank 0 of 8" in said
