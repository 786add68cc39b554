"""The life of two runs: through every launcher, interrupted in every way, with merges made beside them."""

from pathlib import Path

from cluster.cluster import Cluster, wait_for
from pretraining import SMALL_JOB, UNTIL, Run, pause_each, processes, site_with
from readme import do_as_readme

from wsm_ds.verification import verify


def test_every_launcher_trains_the_same_run(cluster: Cluster, uninterrupted: dict[int, Run]) -> None:
    for run in uninterrupted.values():
        assert run.attempt == 1
        assert run.newest_step == UNTIL
        assert sorted(run.losses) == list(range(1, UNTIL + 1))
        assert {line["world_size"] for line in run.lines} == {4}
    assert "cmd = srun -n 4 " in uninterrupted[3].log(1, "deepspeed")
    assert {line.split(": ")[0] for line in uninterrupted[2].log(1, "ranks").splitlines()} >= {"n1", "n2"}
    inspected = do_as_readme(cluster, "wsm_ds inspect", run=uninterrupted[3].folder, data=Path()).stdout
    saved = [f"global_step{step}" for step in range(10, UNTIL + 1, 10)]
    assert [line.split()[0] for line in inspected.splitlines()[1:]] == saved
    assert '"step": 80' in do_as_readme(cluster, "tail -n 3", run=uninterrupted[3].folder, data=Path()).stdout


def preempt(cluster: Cluster, jobs: list[str], runs: dict[int, Run]) -> None:
    """Another partition takes the nodes."""
    pause_each(cluster, runs.values(), 5, attempt=1)
    urgent = cluster.submit("-p", "urgent", "--nodes=2", "--nodelist=n1,n2", "--exclusive", "--output=/dev/null",
                            "--wrap", "sleep 1")  # fmt: skip
    for job, run in zip(jobs, runs.values(), strict=True):
        wait_for(f"job {job} is preempted", lambda job=job: cluster.job(job)["PreemptTime"] != "None", 30)  # type: ignore[misc]
        run.go_on(cluster)
    cluster.wait(urgent, "COMPLETED")
    for run in runs.values():
        assert 5 <= run.newest_step == max(run.losses) < UNTIL


def lose_a_node(cluster: Cluster, jobs: list[str], runs: dict[int, Run]) -> None:
    """A node loses its power."""
    pause_each(cluster, runs.values(), 12, attempt=2)
    for job in jobs:
        assert cluster.job(job)["NodeList"] == "n[1-2]"
    cluster.kill("n2")
    for run in runs.values():
        run.go_on(cluster)
    for job in jobs:
        cluster.wait(job, "PENDING", "COMPLETING", timeout_s=90)
        assert cluster.job(job)["Restarts"] == "2"


def near_the_time_limit(cluster: Cluster, jobs: list[str], runs: dict[int, Run]) -> None:
    """The time limit is near: USR1 comes as soon as Slurm looks."""
    pause_each(cluster, runs.values(), 22, attempt=3)
    for job in jobs:
        assert cluster.job(job)["NodeList"] == "n[1,3]"
        hours, minutes, _ = map(int, cluster.job(job)["RunTime"].split(":"))
        cluster.run("head", "scontrol", "update", f"JobId={job}", f"TimeLimit={60 * hours + minutes + 2}")
    for job, run in zip(jobs, runs.values(), strict=True):
        wait_for("USR1", lambda job=job: "USR1: the time limit" in cluster.output(job), 60)  # type: ignore[misc]
        run.go_on(cluster)
    for job in jobs:
        cluster.wait(job, "PENDING", "COMPLETING", timeout_s=60)
        cluster.run("head", "scontrol", "update", f"JobId={job}", "TimeLimit=30")
    for run in runs.values():
        assert 22 <= run.newest_step == max(run.losses) < UNTIL


def cancel_a_link(cluster: Cluster, chained: Run, pending: str, running: str, last: str) -> None:
    """The chain goes on behind a cancelled link; a link that is cancelled while it runs saves, and stays cancelled."""
    chained.pause(cluster, UNTIL + 5, attempt=5)
    cluster.run("head", "scancel", running)
    wait_for("TERM", lambda: "TERM: " in cluster.output(running), 20)
    chained.go_on(cluster)
    cluster.wait(running, "CANCELLED", timeout_s=60)
    assert UNTIL + 5 <= chained.newest_step < UNTIL + 20
    assert cluster.wait(last, timeout_s=120)["JobState"] == "COMPLETED", chained.what_happened()
    assert [cluster.job(job)["JobState"] for job in (pending, running)] == ["CANCELLED"] * 2
    assert (chained.done, chained.lines[-1]["world_size"]) == (110, 2)


def require_merges(merges: Path, chained: Run) -> None:
    """Merges were made beside the run, the last across the change of the number of ranks."""
    first = min(path.stat().st_mtime for path in merges.glob("step*/*"))
    assert first < (chained.folder / "global_step110").stat().st_mtime
    names = ["last2-1-sqrt", "last2-linear", "last4-1-sqrt", "last4-linear"]
    assert sorted(path.name for path in (merges / "step110").iterdir() if path.is_dir()) == names
    assert verify(merges / "step110/last4-linear", full=True).recomputed_bytes > 0


def test_preempted_a_node_lost_the_time_limit_near_cancelled_and_every_loss_is_the_same(
    idle_cluster: Cluster, site: dict[str, str], data: Path, uninterrupted: dict[int, Run], tmp_path: Path
) -> None:
    cluster, folder = idle_cluster, tmp_path / 'it\'s "here"'
    folder.mkdir()
    chained, alone = Run(folder / "zero 3", data, 3), Run(folder / "zero 2", data, 2)
    runs = {3: chained, 2: alone}
    options = ("--output", folder / "%x-%j.out", *SMALL_JOB, "--signal=B:USR1@60")

    def as_readme(words: str, *options: str | Path) -> list[str]:
        return do_as_readme(cluster, words, run=chained.folder, data=data, options=options, **site).stdout.split()

    both = as_readme("slurm/pretrain.sbatch", *options)
    both.append(cluster.submit(*options, "launch/slurm/pretrain.sbatch", *alone.arguments(UNTIL),
                               **site_with(site, folder, WSM_AGENT="none")))  # fmt: skip
    (watch,) = as_readme("slurm/watch.sbatch", "--output", folder / "%x-%j.out", "--nodelist=n3")
    wait_for("the first job has begun", lambda: chained.attempt == 1, 30)
    pending, running = as_readme("chain.sh 1250,1500", *options)
    (last,) = as_readme("chain.sh 1750", *options)

    preempt(cluster, both, runs)
    lose_a_node(cluster, both, runs)
    assert cluster.job(pending)["Reason"] == "Dependency"
    near_the_time_limit(cluster, both, runs)
    cluster.run("head", "scancel", pending)

    for job, (stage, run) in zip(both, runs.items(), strict=True):
        assert cluster.wait(job, timeout_s=180)["JobState"] == "COMPLETED", run.what_happened()
        assert {step: run.losses[step] for step in range(1, UNTIL + 1)} == uninterrupted[stage].losses
    assert alone.attempt == 4
    cluster.boot("n2")  # not before: Slurm would still send the lost node's order to end to these jobs' new ranks
    cancel_a_link(cluster, chained, pending, running, last)

    # DeepSpeed loads a merge
    cluster.wait(watch, "COMPLETED", timeout_s=60)
    merges = Path(f"{chained.folder}-merges")
    require_merges(merges, chained)
    branch = Run(merges / "step110/last4-linear", data, 3)
    job = cluster.submit(*options, "launch/slurm/pretrain.sbatch", *branch.arguments(115), **site)
    assert cluster.wait(job, timeout_s=120)["JobState"] == "COMPLETED", branch.what_happened()
    assert sorted(branch.losses) == list(range(111, 116))
    assert abs(branch.losses[111] - chained.losses[110]) < 0.5 < uninterrupted[3].losses[1] - branch.losses[111]
    wait_for("nothing of the jobs runs", lambda: not processes(cluster), 30)
