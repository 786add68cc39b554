"""What goes wrong with nodes and ranks, and what the job does: leave out, end, fence off, go on, or stop loudly."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from cluster.cluster import Cluster, wait_for
from pretraining import SECRET, SMALL_JOB, Run, processes, site_with
from readme import do_as_readme

ENDLESS = 1_000_000


@dataclass(frozen=True)
class Job:
    """A job that was submitted."""

    id: str
    run: Run
    output: Path


def submit(cluster: Cluster, run: Run, folder: Path, site: dict[str, str], *options: str) -> Job:
    """`sbatch … pretrain.sbatch`, of a run that never ends by itself."""
    arguments = run.arguments(ENDLESS, save_every=50)
    output = ("--output", folder / "%x-%j.out")
    job = cluster.submit(*output, *SMALL_JOB, *options, "launch/slurm/pretrain.sbatch", *arguments, **site)
    return Job(job, run, folder / f"pretrain-{job}.out")


@pytest.fixture(scope="module")
def hopeless(cluster: Cluster, site: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Job:
    """On n1 and n2: n2 cannot write the run's folder, and training always fails. It goes on while others are tested."""
    cluster.wait_until_idle()
    folder = tmp_path_factory.mktemp("hopeless")
    run = Run(folder / "run", folder / "no such data")
    run.folder.mkdir()
    cluster.run("n2", "mount", "--bind", run.folder, run.folder)
    cluster.run("n2", "mount", "-o", "remount,bind,ro", run.folder)
    return submit(cluster, run, folder, site, "--nodes=2")


def test_unfit_node_left_out_hang_ended_cut_off_node_fenced_off_and_stopped_by_a_file(
    cluster: Cluster, hopeless: Job, site: dict[str, str], data: Path, tmp_path: Path
) -> None:
    run = Run(tmp_path / "run", data)
    here = site_with(site, tmp_path, WSM_LOCAL="/run/scratch", WSM_HANG_S="15", WSM_MAX_CRASHES="3")
    cluster.run("n1", "touch", "/run/scratch")  # a file where a folder has to be: the disk of n1 is broken
    job = submit(cluster, run, tmp_path, here, "--nodes=1")

    # attempt 1 finds n1 unfit, attempt 2 runs elsewhere; one of its ranks is stopped and names itself by its silence
    run.wait_for_step(60, attempt=2)
    assert cluster.job(job.id)["ExcNodeList"] == "n1"
    assert "n1: unfit: /run/scratch/wsm-" in (run.folder / "job/bad_nodes").read_text()
    stopped = run.beat(1)
    cluster.run(stopped["host"], "touch", f"/run/scratch/wsm-{job.id}/torch/lock")
    cluster.run(stopped["host"], "kill", "-s", "STOP", str(stopped["pid"]))
    wait_for("the hang is ended", lambda: "ending the ranks" in job.output.read_text(), timeout_s=15 + 15)
    assert f"the slowest is rank 1 on {stopped['host']} (process {stopped['pid']})" in job.output.read_text()

    # attempt 3 goes on; its node is cut off, and trains on as if nothing had happened
    resumed = run.newest_step
    run.wait_for_step(resumed + 60, attempt=3)
    assert f"resuming from {run.folder}/global_step{resumed} " in run.log(3, f"node-{run.beat(0)['host']}")
    node = run.beat(0)["host"]
    lock = cluster.run(node, "ls", f"/run/scratch/wsm-{job.id}/torch").stdout
    assert "lock" not in lock  # of the attempt that was killed; torch would wait for it for ever
    cluster.cut(node)
    cluster.wait(job.id, "PENDING", timeout_s=60)
    step = run.newest_step
    wait_for("it trains on", lambda: run.newest_step > step, 20)

    # attempt 4 begins elsewhere; the ranks on the cut-off node learn it from the shared folder, and leave
    run.wait_for_step(run.newest_step + 1, attempt=4)
    wait_for(f"{node} has no ranks", lambda: not processes(cluster, node), 30)
    assert "Superseded: attempt 3 of" in run.log(3, f"node-{node}")
    assert not (run.folder / "job/attempt-3").exists()
    assert run.beat(0)["host"] != node
    cluster.join(node)

    # the kill switch
    do_as_readme(cluster, 'touch "$RUN/job/stop"', run=run.folder, data=data)
    cluster.wait(job.id, "FAILED", timeout_s=60)
    assert f"stopped by {run.folder}/job/stop" in job.output.read_text()
    assert run.newest_step == max(line["step"] for line in run.lines if line["attempt"] == 4)
    again = submit(cluster, run, tmp_path, here, "--nodes=1")
    cluster.wait(again.id, "FAILED", timeout_s=60)
    assert "remove it to continue" in again.output.read_text()
    assert run.attempt == 4
    do_as_readme(cluster, 'rm "$RUN/job/stop"', run=run.folder, data=data)
    assert not (run.folder / "job/stop").exists()
    cluster.run("n1", "rm", "/run/scratch")


def test_an_unfit_second_node_is_replaced_and_a_crash_loop_stops_loudly(cluster: Cluster, hopeless: Job) -> None:
    cluster.wait(hopeless.id, "FAILED", timeout_s=120)
    assert cluster.job(hopeless.id)["ExcNodeList"] == "n2"
    assert cluster.job(hopeless.id)["Restarts"] == "2"
    assert "Read-only file system" in (hopeless.run.folder / "job/bad_nodes").read_text()
    said = hopeless.output.read_text()
    assert "restart 1, on n1 n3" in said
    assert "GIVING UP: 2 attempts in a row ended without a new checkpoint" in said
    assert "2 attempts in a row" in (hopeless.run.folder / "job/failed").read_text()
    assert "no such data" in hopeless.run.log(3, "node-n1")
    cluster.run("n2", "umount", hopeless.run.folder)


def test_through_deepspeeds_launcher_too_a_hang_is_ended_and_the_time_limits_signal_saves(
    idle_cluster: Cluster, site: dict[str, str], data: Path, tmp_path: Path
) -> None:
    cluster, run = idle_cluster, Run(tmp_path / "run", data)
    here = site_with(site, tmp_path, WSM_AGENT="deepspeed", WSM_HANG_S="15")
    job = submit(cluster, run, tmp_path, here, "--nodes=2")
    run.wait_for_step(60, attempt=1)
    stopped = run.beat(3)
    cluster.run(stopped["host"], "kill", "-s", "STOP", str(stopped["pid"]))
    wait_for("the hang is ended", lambda: "ending the ranks" in job.output.read_text(), timeout_s=15 + 15)
    assert f"the slowest is rank 3 on {stopped['host']} (process {stopped['pid']})" in job.output.read_text()
    run.wait_for_step(run.newest_step + 10, attempt=2)
    cluster.run("head", "scancel", "--batch", "--signal=USR1", job.id)
    cluster.wait(job.id, "PENDING", "COMPLETING", timeout_s=60)
    assert run.newest_step == max(line["step"] for line in run.lines if line["attempt"] == 2)
    cluster.run("head", "scancel", job.id)


def require_secrecy(cluster: Cluster, run: Run, rank: int) -> None:
    """The secret of the site's file has reached a rank on n1, but no command line of a host, and no log."""
    variables = cluster.run("n1", "cat", f"/proc/{rank}/environ").stdout.split("\0")
    assert f'HF_TOKEN={SECRET}\n"$HOME" %h' in variables
    for host in ("head", "n1"):
        lines = cluster.run(host, "ps", "-ww", "-eo", "args").stdout
        assert "launch/pretrain.py" in lines
        assert SECRET not in lines
    logs = run.folder / "job/logs/attempt-1"
    assert [path.name for path in logs.iterdir() if SECRET in path.read_text(errors="replace")] == ["site"]
    assert {(logs / name).stat().st_mode & 0o777 for name in ("site", "provenance")} == {0o600}
    assert "\nWSM_RANKS_PER_NODE=2\n" in run.log(1, "provenance")
    assert "\nalso set, not recorded: HF_TOKEN PYTHONPATH\n" in run.log(1, "provenance")


def test_over_ssh_too_an_unfit_host_is_left_out_a_hang_is_ended_and_sigterm_saves(
    cluster: Cluster, site: dict[str, str], data: Path, tmp_path: Path
) -> None:
    run = Run(tmp_path / "it's here", data)
    run.folder.mkdir()
    cluster.run("n2", "mount", "--bind", run.folder, run.folder)
    cluster.run("n2", "mount", "-o", "remount,bind,ro", run.folder)
    command = ("launch/pdsh/pretrain.sh", "launch/pdsh/hostfile", *run.arguments(ENDLESS, save_every=50))
    script = cluster.start("head", *command, **site_with(site, tmp_path, WSM_HANG_S="15"))
    run.wait_for_step(60, attempt=1)
    stopped = run.beat(1)
    assert stopped["host"] == "n1"
    require_secrecy(cluster, run, stopped["pid"])
    cluster.run("n1", "kill", "-s", "STOP", str(stopped["pid"]))
    run.wait_for_step(run.newest_step + 10, attempt=2)
    script_pid = cluster.run("head", "pgrep", "-of", "launch/pdsh/pretrain.sh").stdout.strip()
    cluster.run("head", "kill", script_pid)
    said, _ = script.communicate(timeout=180)
    assert script.returncode == 75, said + run.what_happened()
    assert "n2 is left out: n2: n2: unfit: " in said
    assert f"the slowest is rank 1 on n1 (process {stopped['pid']})" in said
    assert run.newest_step == max(line["step"] for line in run.lines if line["attempt"] == 2)
    assert {line["world_size"] for line in run.lines} == {2}
    wait_for("no rank is left", lambda: not processes(cluster), 20)
    cluster.run("n2", "umount", run.folder)
