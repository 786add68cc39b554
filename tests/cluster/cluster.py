"""A Slurm and ssh cluster on one machine: real slurmctld, slurmd, munged and sshd, each host in its own namespaces.

`head` holds the controller, and the bridge inside its own network namespace, so the machine itself gets no interface,
route, mount or file outside the state folder. Every host's PID 1 dies with the process that made it, and with it all
that runs there: nothing is left behind, and a power failure of one host is one SIGKILL. Needs root.

    python tests/cluster/cluster.py                    # bring one up and wait for Ctrl-C; prints its STATE folder
    python tests/cluster/cluster.py STATE HOST CMD…    # run a command on one of its hosts
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
NETWORK = "10.77.0"
SYSTEM_PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"
COMMANDS = ("slurmctld", "slurmd", "srun", "munged", "pdsh", "sshd", "ip", "unshare", "nsenter", "setpriv")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "DEADLINE")
BUSY = 3
"""How many times slower than when it is idle a machine may be on which the tests still pass."""
PRIVATE = (Path("/tmp"), Path("/run"), Path("/dev/shm"))
"""What every host has for itself."""


class ClusterError(AssertionError):
    """Something of the cluster did not come about in time."""


def why_not() -> str | None:
    """Why no cluster can run here, or None."""
    if os.geteuid() != 0:
        return "the test cluster needs root"
    missing = [name for name in COMMANDS if shutil.which(name, path=SYSTEM_PATH) is None]
    if missing:
        return f"the test cluster needs {', '.join(missing)}: run tests/cluster/install.sh"
    done = subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True, check=False)
    return f"unshare is refused here: {done.stderr.decode().strip()}" if done.returncode else None


def wait_for(what: str, condition: Callable[[], Any], timeout_s: float, poll_s: float = 0.2) -> Any:
    """The first true value of `condition`.

    Args:
        what: it waits for, in words.
        condition: asked again and again.
        timeout_s: that it may take on an idle machine.
        poll_s: between two questions.

    Raises:
        ClusterError: there was none in time.
    """
    deadline = time.monotonic() + BUSY * timeout_s
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > deadline:
            raise ClusterError(f"not within {BUSY * timeout_s:g} s: {what}")
        time.sleep(poll_s)


class Cluster:
    """The hosts `head`, `n1` … `n{nodes}`; a context manager.

    Args:
        nodes: compute hosts; each pretends to have 64 CPUs, 256 GB and 8 GPUs.
        shared: folders that all hosts see although they lie in /tmp.
    """

    def __init__(self, *, nodes: int = 3, shared: Sequence[Path] = ()) -> None:
        self.nodes = [f"n{i}" for i in range(1, nodes + 1)]
        self.state = Path(tempfile.mkdtemp(prefix="wsm-", dir="/tmp"))
        candidates = (REPOSITORY, Path(sys.prefix), *shared)
        self.shared = [path for path in candidates if any(path.is_relative_to(folder) for folder in PRIVATE)]
        self.hosts: dict[str, psutil.Process] = {}
        self.started: list[tuple[psutil.Popen, psutil.Process]] = []

    def __enter__(self) -> "Cluster":
        try:
            self._write_files()
            for host in ("head", *self.nodes):
                self._boot(host)
            self.run("head", "slurmctld", "-c")
            for node in self.nodes:
                self.run(node, "slurmd", "-N", node)
            self.wait_until_idle(timeout_s=60)
        except BaseException:
            print(self.logs(), file=sys.stderr)
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for host in list(self.hosts):
            self.kill(host)
        shutil.rmtree(self.state)
        alive = [process.pid for pair in self.started for process in pair if process.is_running()]
        assert not alive, f"processes of the cluster still run: {alive}"

    def run(
        self,
        host: str,
        *command: str | Path,
        check: bool = True,
        timeout_s: float = 60,
        cwd: Path = REPOSITORY,
        **environment: str,
    ) -> subprocess.CompletedProcess[str]:
        """One command on a host, to its end.

        Raises:
            ClusterError: it failed, and `check` is true.
        """
        done = subprocess.run(
            inside(self.hosts[host].pid, *command, cwd=cwd),
            env=clean_environment() | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=BUSY * timeout_s,
            check=False,
        )
        if check and done.returncode:
            raise ClusterError(f"{host}$ {' '.join(map(str, command))}: exit code {done.returncode}\n{done.stderr}")
        return done

    def start(self, host: str, *command: str | Path, cwd: Path = REPOSITORY, **environment: str) -> Any:
        """One command on a host, in the background; a Popen."""
        return subprocess.Popen(
            inside(self.hosts[host].pid, *command, cwd=cwd),
            env=clean_environment() | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def submit(self, *arguments: str | Path, **options: Any) -> str:
        """`sbatch ARGUMENTS…` on the head; the job's id."""
        return self.run("head", "sbatch", "--parsable", *arguments, **options).stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says; paths are cut at their first space."""
        text = self.run("head", "scontrol", "show", "job", "--oneliner", job).stdout
        return dict(field.split("=", 1) for field in text.split() if "=" in field)

    def output(self, job: str) -> str:
        """What the script of a job has said."""
        text = self.run("head", "scontrol", "show", "job", job).stdout
        path = next(line for line in text.splitlines() if line.strip().startswith("StdOut="))
        return Path(path.strip().removeprefix("StdOut=")).read_text()

    def wait(self, job: str, *states: str, timeout_s: float = 120) -> dict[str, str]:
        """The job, once it is in one of `states` (default: ended).

        Raises:
            ClusterError: it is not in time, or it ended otherwise.
        """
        wanted, found = states or ENDED, {}

        def arrived() -> bool:
            found.update(self.job(job))
            return found["JobState"] in (*wanted, *ENDED)

        wait_for(f"job {job} is {' or '.join(wanted)}", arrived, timeout_s)
        if found["JobState"] not in wanted:
            raise ClusterError(f"job {job} is {found['JobState']} ({found['Reason']}), not {' or '.join(wanted)}")
        return found

    def wait_until_idle(self, timeout_s: float = 60) -> None:
        """Returns when every node waits for jobs."""

        def idle() -> bool:
            listed = self.run("head", "sinfo", "-h", "-N", "-p", "train", "-o", "%T", check=False).stdout.split()
            return listed == ["idle"] * len(self.nodes)

        wait_for("all nodes are idle", idle, timeout_s)

    def kill(self, host: str) -> None:
        """A power failure: everything on the host dies at once."""
        first = self.hosts.pop(host)
        first.kill()
        next(unshare for unshare, process in self.started if process == first).wait(timeout=10)

    def boot(self, node: str) -> None:
        """Starts a node again after `kill`, and waits until Slurm takes it back."""
        self._boot(node)
        self.run(node, "slurmd", "-N", node)

        def is_back() -> bool:
            return self.run("head", "sinfo", "-h", "-p", "train", "-n", node, "-o", "%T").stdout.strip() in (
                "idle", "mixed", "allocated")  # fmt: skip

        wait_for(f"Slurm takes {node} back", is_back, 60)

    def cut(self, node: str) -> None:
        """Unplugs a node's network: nobody is told, packets vanish."""
        self._in_network("head", f"ip link set {node} down")

    def join(self, node: str) -> None:
        """Plugs it in again."""
        self._in_network("head", f"ip link set {node} up")

    def logs(self, lines: int = 15) -> str:
        """The ends of all daemons' logs."""
        files = sorted((self.state / "log").glob("*"))
        tails = [(path, path.read_text(errors="replace").splitlines()[-lines:]) for path in files]
        return "\n".join(f"== {path.name}\n" + "\n".join(tail) for path, tail in tails if tail)

    def _boot(self, host: str) -> None:
        """Namespaces, network, munged and sshd of one host."""
        log = (self.state / f"log/host.{host}").open("w")
        flags = ["--net", "--uts", "--mount", "--ipc", "--pid", "--fork", "--mount-proc", "--kill-child"]
        unshare = psutil.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", *flags, HERE / "host.sh", host, self.state, *self.shared],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip

        def first_process() -> psutil.Process | None:
            if unshare.poll() is not None:
                raise ClusterError(f"{host} did not start: {Path(log.name).read_text()}")
            ready = [child for child in unshare.children() if Path(f"/proc/{child.pid}/root/run/ready").exists()]
            return ready[0] if ready else None

        self.hosts[host] = wait_for(f"{host} is ready", first_process, 20, poll_s=0.02)
        self.started.append((unshare, self.hosts[host]))
        log.close()
        if host == "head":
            self._in_network(host, f"ip link add br0 type bridge && ip addr add {NETWORK}.254/24 dev br0 && "
                             "ip link set br0 up")  # fmt: skip
        else:
            self._plug_in(host)
        self.run(host, "munged", "--key-file=/run/munge/munge.key", "--seed-file=/run/munge/seed", "--force",
                 f"--log-file={self.state}/log/munged.{host}", "--num-threads=2")  # fmt: skip
        self.run(host, "/usr/sbin/sshd", "-f", f"{self.state}/etc/sshd_config", "-E", f"{self.state}/log/sshd.{host}")
        listening = Path(f"/proc/{self.hosts[host].pid}/root/run/sshd.pid")
        wait_for(f"sshd of {host} listens", listening.exists, 20, poll_s=0.02)

    def _plug_in(self, node: str) -> None:
        """A cable from a node's eth0 to the bridge."""
        pid, address = self.hosts[node].pid, f"{NETWORK}.{node[1:]}"
        self._in_network("head", f"ip link del {node} 2>/dev/null; ip link add {node} type veth peer name eth0 "
                         f"netns {pid} && ip link set {node} master br0 up")  # fmt: skip
        self._in_network(node, f"ip addr add {address}/24 dev eth0 && ip link set eth0 up && "
                         f"ip route add default via {NETWORK}.254")  # fmt: skip

    def _in_network(self, host: str, script: str) -> None:
        """A shell script in a host's network namespace, with this machine's files."""
        command = ["nsenter", "--target", str(self.hosts[host].pid), "--net", "sh", "-c", script]
        subprocess.run(command, check=True, capture_output=True, timeout=20)

    def _write_files(self) -> None:
        for folder in ("etc/slurm", "ssh", "log", "spool", "dev"):
            (self.state / folder).mkdir(parents=True)
        values = {"state": self.state, "network": NETWORK, "nodes": len(self.nodes),
                  "first_job": int(time.time()) % 1_000_000 + 1000}  # fmt: skip
        for name, place in (("slurm.conf", "slurm/slurm.conf"), ("sshd_config",) * 2, ("ssh_config",) * 2):
            (self.state / "etc" / place).write_text((HERE / name).read_text().format(**values))
        (self.state / "etc/slurm/cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        for gpu in range(8):  # null devices: enough for Slurm to hand them out and to set CUDA_VISIBLE_DEVICES
            os.mknod(self.state / f"dev/gpu{gpu}", 0o020666, os.makedev(1, 3))
        (self.state / "etc/slurm/gres.conf").write_text(f"Name=gpu File={self.state}/dev/gpu[0-7]\n")
        (self.state / "etc/munge.key").write_bytes(secrets.token_bytes(128))
        addresses = {"head": f"{NETWORK}.254"} | {node: f"{NETWORK}.{node[1:]}" for node in self.nodes}
        lines = ["127.0.0.1 localhost", *(f"{address} {host}" for host, address in addresses.items())]
        (self.state / "etc/hosts").write_text("\n".join(lines) + "\n")
        for key in ("host", "user"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.state / "ssh" / key], check=True)
        host_key = " ".join((self.state / "ssh/host.pub").read_text().split()[:2])
        names = ",".join([*addresses, *addresses.values()])
        (self.state / "ssh/known_hosts").write_text(f"{names} {host_key}\n")


def inside(pid: int, *command: str | Path, cwd: Path = REPOSITORY) -> list[str]:
    """The command line that runs `command` on the host whose first process is `pid`."""
    enter = ["nsenter", "--target", str(pid), "--net", "--uts", "--ipc", "--mount", "--pid", f"--wdns={cwd}", "--"]
    return [*enter, *map(str, command)]


def clean_environment() -> dict[str, str]:
    """What a login shell on the cluster would have: nothing of the process that runs the tests."""
    return {"PATH": SYSTEM_PATH, "HOME": "/root", "USER": "root", "LANG": "C.UTF-8", "SHELL": "/bin/bash"}


def main(arguments: list[str]) -> int:
    """The command line of the docstring."""
    if arguments:
        state, host, *command = arguments
        pid = int((Path(state) / "pids" / host).read_text())
        return subprocess.run(inside(pid, *command), env=clean_environment(), check=False).returncode
    with Cluster() as cluster:
        (cluster.state / "pids").mkdir()
        for host, process in cluster.hosts.items():
            (cluster.state / "pids" / host).write_text(str(process.pid))
        print(f"up: {cluster.state}", flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            signal.pause()
        except KeyboardInterrupt:
            return 0
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
