"""A SLURM cluster of three nodes with two GPUs each, all of it made up, on this machine.

The third node is a partition of its own. munge, a controller and the slurmd run on loopback, with
everything they write in one private folder. Jobs are real, nodes and their cores and GPUs are not.
Everything is stopped and removed at the end, jobs included. It needs root, munge and SLURM:

    apt-get install --no-install-recommends slurm-wlm munge
    python tests/slurm_cluster.py bash      # or any other command, which then finds the cluster
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

# SLURM's programs look here when they are told of no other place, and Snakemake tells of none.
SYSTEM_CONF = Path("/etc/slurm/slurm.conf")
NODES = ("n1", "n2")
APART = "n3"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
OURS = "NEUROMAMBA_TEST_CLUSTER"  # in the environment of all that runs in the cluster
PATH = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])

CONF = """# {ours}
ClusterName=made-up
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/finished
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=100000
ReturnToService=2
SlurmdTimeout=8
KillWait=20
JobRequeue=1
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=DEFAULT CPUs=16 RealMemory=200000 Gres=gpu:2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]}
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]}
NodeName=n3 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[3]}
PartitionName=all Nodes=n1,n2 Default=YES LLN=YES MaxTime=INFINITE State=UP
PartitionName=apart Nodes=n3 MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """Why no cluster can be started here, if so."""
    missing = [name for name in PROGRAMS if not shutil.which(name, path=PATH)]
    if missing:
        return f"{', '.join(missing)} not installed (apt-get install slurm-wlm munge)"
    if os.geteuid() != 0:
        return "a made-up SLURM cluster needs root"
    if os.path.lexists(SYSTEM_CONF) and not (_is_ours() and _owner_is_gone()):
        return f"{SYSTEM_CONF} exists: this machine belongs to a cluster"
    return None


def _is_ours() -> bool:
    return SYSTEM_CONF.is_symlink() and SYSTEM_CONF.readlink().parent.name.startswith(OURS)


def _owner_is_gone() -> bool:
    owner = SYSTEM_CONF.readlink().parent.name.removeprefix(OURS).split("-")[1]
    return not Path(f"/proc/{owner}").exists()


def wait_for(told: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    """Wait until something is true, which is looked at ten times a second."""
    deadline = time.monotonic() + seconds
    while not told():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(0.1)


def ask(*command: str) -> str:
    """What one of SLURM's programs answers."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout.strip()


@dataclass
class Cluster:
    """A cluster that is up.

    Attributes
    ----------
    folder
        Everything that its programs write.
    environment
        For what is to run in it.
    """

    folder: Path
    environment: dict[str, str]
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as out:
            self.daemons[name] = subprocess.Popen(
                command,
                env=self.environment,
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def start_node(self, node: str) -> None:
        """Start a node, or one that went down again."""
        self.start(node, "slurmd", "-D", "-f", str(self.folder / "slurm.conf"), "-N", node)
        wait_for(lambda: self.state(node) in ("idle", "mixed", "allocated"), f"node {node}")

    def state(self, node: str) -> str:
        """What the controller takes a node to be: idle, mixed, down, ..."""
        return ask("sinfo", "--noheader", "--nodes", node, "--format", "%T").rstrip("*")

    def cut_power(self, node: str) -> None:
        """End a node and all that runs there, without a word to anyone."""
        self.kill_slurmd(node)
        self._kill(lambda environment: f"SLURMD_NODENAME={node}".encode() in environment)

    def kill_slurmd(self, node: str) -> None:
        """End what the controller hears of a node, while its jobs run on."""
        self.daemons[node].kill()
        self.daemons.pop(node).wait()

    def give_up(self, node: str) -> None:
        """Tell the controller that a node is lost, which it would find out by itself later.

        Its jobs start elsewhere at once; by itself SLURM waits another two minutes with that.
        """
        jobs = ask("squeue", "--noheader", "--nodelist", node, "--format", "%i").split()
        ask("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")
        for job in jobs:
            ask("scontrol", "update", f"JobId={job}", "StartTime=now")

    def stop(self) -> None:
        """Stop everything that runs in the cluster, then the cluster."""
        with suppress(RuntimeError, subprocess.TimeoutExpired):
            ask("scancel", "--signal=KILL", "--full", "--user=root")
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(timeout=5)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._kill(lambda environment: True)

    def processes(self, wanted: Callable[[list[bytes]], bool]) -> list[int]:
        """The jobs' processes whose environment is wanted, and the slurmstepd above them."""
        found = set()
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                environment = (entry / "environ").read_bytes().split(b"\0")
                if f"{OURS}={self.folder}".encode() in environment and wanted(environment):
                    found |= {int(entry.name), *_stepd_above(entry)}
        return sorted(found - {os.getpid()})

    def _kill(self, wanted: Callable[[list[bytes]], bool]) -> None:
        def none_left() -> bool:
            left = self.processes(wanted)
            for process in left:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            return not left

        wait_for(none_left, "the end of all jobs")


def _stepd_above(entry: Path) -> set[int]:
    """The parent of a process, where that is a slurmstepd."""
    parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    name = Path(f"/proc/{parent}/comm").read_text().strip()
    return {parent} if name == "slurmstepd" else set()


def _configure(folder: Path) -> None:
    with _free_ports(4) as ports:
        host = socket.gethostname().split(".")[0]
        text = CONF.format(ours=OURS, host=host, folder=folder, ports=ports)
    (folder / "slurm.conf").write_text(text)
    lines = ["AutoDetect=off"]
    for node in (*NODES, APART):
        for number in range(2):
            device = folder / f"{node}-gpu{number}"
            os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
            lines.append(
                f"NodeName={node} Name=gpu File={device} Flags=nvidia_gpu_env",
            )
    (folder / "gres.conf").write_text("\n".join(lines) + "\n")
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    (folder / "state").mkdir()


@contextmanager
def _free_ports(number: int) -> Iterator[list[int]]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    yield [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()


@contextmanager
def _system_conf(folder: Path) -> Iterator[None]:
    """Have the cluster's configuration where all of SLURM's programs find it."""
    made = not SYSTEM_CONF.parent.exists()
    SYSTEM_CONF.parent.mkdir(exist_ok=True)
    if os.path.lexists(SYSTEM_CONF):
        # Ours, of a test that was killed: `why_not` has looked.
        stale = SYSTEM_CONF.readlink().parent
        Cluster(stale, {}).stop()
        shutil.rmtree(stale, ignore_errors=True)
        SYSTEM_CONF.unlink()
    SYSTEM_CONF.symlink_to(folder / "slurm.conf")
    try:
        yield
    finally:
        SYSTEM_CONF.unlink()
        if made:
            SYSTEM_CONF.parent.rmdir()


@contextmanager
def cluster() -> Iterator[Cluster]:
    """A cluster that is up, and is gone afterwards."""
    if reason := why_not():
        raise RuntimeError(reason)
    with tempfile.TemporaryDirectory(prefix=f"{OURS}-{os.getpid()}-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # munge's socket is to be reached
        _configure(folder)
        environment = {**os.environ, "PATH": PATH, OURS: str(folder)}
        it = Cluster(folder, environment)
        with _system_conf(folder):
            try:
                munge = {"key-file": "munge.key", "socket": "munge.socket"}
                munge |= {f"{kind}-file": f"munge.{kind}" for kind in ("pid", "log", "seed")}
                options = [f"--{option}={folder / file}" for option, file in munge.items()]
                it.start("munged", "munged", "--foreground", "--force", *options)
                wait_for((folder / "munge.socket").exists, "munge")
                it.start("slurmctld", "slurmctld", "-D", "-c", "-f", str(folder / "slurm.conf"))
                wait_for(lambda: _answers("scontrol", "ping"), "the controller")
                for node in (*NODES, APART):
                    it.start_node(node)
                yield it
            except TimeoutError as error:
                for log in sorted(folder.glob("*.out")):
                    error.add_note(f"{log.name}: {log.read_text()[-2000:]}")
                raise
            finally:
                it.stop()


def _answers(*command: str) -> bool:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode == 0 and "UP" in done.stdout


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with cluster() as made_up:
        status = subprocess.run(sys.argv[1:] or ["sinfo"], env=made_up.environment, check=False)
    sys.exit(status.returncode)
