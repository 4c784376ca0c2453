"""A real Slurm on this machine: munged, slurmctld, and a slurmd for each emulated node.

Each slurmd runs in PID, mount and host-name namespaces of its own, so that a node has its own
host name, sees only its own processes, and loses all of them when its slurmd goes.
"""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

# Debian keeps the daemons where ordinary users do not look.
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"

# Non-root users need a user namespace, in which they may then make the others.
_NAMESPACES = [
    "unshare",
    *([] if os.getuid() == 0 else ["--map-current-user", "--keep-caps"]),
    *("--mount", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child"),
]
# The shell stays as the first process of its namespace and collects orphans.
# /mnt/bb is the node's own disk, empty again after the power has been off.
_NODE = """
set -e
hostname "$1"
mount --bind "$2" /etc/hosts
mount -t tmpfs none /mnt
mkdir /mnt/bb
for gpu in "$3"/*; do mount --bind /dev/null "$gpu"; done
slurmd -D -N "$1" &
wait
"""

_CPUS, _GPUS = 64, 8
"""Of a node, as Slurm believes: enough for the jobs of all site profiles."""

_START_SECONDS = 30


def missing_requirement() -> str | None:
    """Say what a private Slurm lacks on this machine, or None if nothing."""
    programs = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "sinfo", "unshare", "setpriv")
    missing = [program for program in programs if shutil.which(program, path=PATH) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: slurm-wlm, munge, libpmix-dev)"
    probe = subprocess.run([*_NAMESPACES, "true"], capture_output=True, text=True, check=False)
    if probe.returncode != 0:
        return f"no right to make namespaces: {probe.stderr.strip()}"
    return None


class PrivateSlurm:
    """A cluster of `nodes` nodes, named node1, node2, …, with make-believe GPUs.

    Everything it writes lies in `directory`; the daemons' logs stay there when it has stopped.
    """

    def __init__(self, directory: Path, nodes: int = 2) -> None:
        self.nodes = [f"node{number}" for number in range(1, nodes + 1)]
        self.directory = directory
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        outside = {key: value for key, value in os.environ.items() if "SLURM" not in key}
        self.environment = {**outside, "PATH": PATH, "SLURM_CONF": str(directory / "slurm.conf")}

    def start(self) -> None:
        """Start the daemons and wait until all nodes are idle."""
        deadline = time.monotonic() + _START_SECONDS
        port = self._write_configuration()
        self._start_munged(deadline)
        self._start_daemon("slurmctld", ["slurmctld", "-D"])
        self._wait(lambda: _answers(port), deadline, "slurmctld does not listen")
        for node in self.nodes:
            self._start_node(node)
        self._wait(self._all_idle, deadline, "the nodes do not become idle")

    def power_off(self, node: str) -> None:
        """End a node with all its processes, and let the controller know at once."""
        self._kill(self._daemons.pop(node))
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=power")

    def power_on(self, node: str) -> None:
        """Start a node that was switched off."""
        for name in ("spool", "tmp"):  # PMIx trips over what it left there
            shutil.rmtree(self.directory / name / node, ignore_errors=True)
        (self.directory / "tmp" / node).mkdir()
        self._start_node(node)
        self.run("scontrol", "update", f"nodename={node}", "state=resume")

    def stop(self) -> None:
        """End all daemons and, with the nodes' namespaces, every process of every job."""
        for daemon in reversed(self._daemons.values()):
            self._kill(daemon)
        self._daemons.clear()

    def run(
        self, *command: str | Path, env: dict[str, str] | None = None, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run a program like `srun` or `sbatch` against this cluster, in its directory."""
        return subprocess.run(
            [str(word) for word in command],
            cwd=self.directory,
            env={**self.environment, **(env or {})},
            timeout=timeout,
            capture_output=True,
            text=True,
            check=False,
        )

    def _write_configuration(self) -> int:
        """Write slurm.conf and hosts; return slurmctld's port."""
        controller_port, *node_ports = _free_ports(1 + len(self.nodes))
        user, here, home = getpass.getuser(), socket.gethostname(), self.directory
        for name in ("state", "spool", "log", "munge", *(f"tmp/{node}" for node in self.nodes)):
            (home / name).mkdir(parents=True)
        lines = [
            "ClusterName=private",
            f"SlurmctldHost={here}(127.0.0.1)",
            f"SlurmctldPort={controller_port}",
            f"AuthInfo=socket={home}/munge/socket",
            f"SlurmUser={user}",
            f"SlurmdUser={user}",
            f"StateSaveLocation={home}/state",
            f"SlurmdSpoolDir={home}/spool/%n",
            # PMIx keeps files there that two nodes must not share.
            f"TmpFS={home}/tmp/%n",
            f"SlurmctldPidFile={home}/slurmctld.pid",
            f"SlurmdPidFile={home}/%n.pid",
            f"SlurmctldLogFile={home}/log/slurmctld.log",
            f"SlurmdLogFile={home}/log/%n.log",
            # No control groups: they belong to the machine.
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_Core",
            "MpiDefault=none",
            "ReturnToService=2",
            # Believe the node lines below, not the hardware.
            "SlurmdParameters=config_overrides",
            # Schedule at once: the default is to gather requests for seconds.
            "SchedulerParameters=sched_min_interval=0,batch_sched_delay=0,bf_interval=1",
            "PropagateResourceLimits=NONE",
            "GresTypes=gpu",
            f"PartitionName=batch Nodes={','.join(self.nodes)} Default=YES",
        ]
        lines += [
            f"NodeName={node} NodeAddr=127.0.0.1 Port={port} CPUs={_CPUS} RealMemory=1024 "
            f"Gres=gpu:{_GPUS} Feature=nvme,gpu,cpu"
            for node, port in zip(self.nodes, node_ports, strict=True)
        ]
        (home / "gpu").mkdir()
        for number in range(_GPUS):
            (home / "gpu" / str(number)).touch()
        gpus = f"Name=gpu File={home}/gpu/[0-{_GPUS - 1}]\n"
        (home / "gres.conf").write_text(gpus)
        (home / "slurm.conf").write_text("\n".join(lines) + "\n")
        (home / "hosts").write_text(f"127.0.0.1 localhost {here} {' '.join(self.nodes)}\n")
        return controller_port

    def _start_munged(self, deadline: float) -> None:
        munge = self.directory / "munge"
        munge.chmod(0o755)  # munged insists: others must reach the socket
        key = munge / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        options = {
            "key-file": key,
            "socket": munge / "socket",
            "pid-file": munge / "pid",
            "log-file": munge / "log",
            "seed-file": munge / "seed",
            "origin": "127.0.0.1",
        }
        words = [f"--{name}={value}" for name, value in options.items()]
        self._start_daemon("munged", ["munged", "--foreground", "--force", *words])
        self._wait((munge / "socket").exists, deadline, "munged makes no socket")

    def _start_node(self, node: str) -> None:
        places = [str(self.directory / name) for name in ("hosts", "gpu")]
        script = ["bash", "-c", _NODE, "bash", node, *places]
        self._start_daemon(node, [*_NAMESPACES, *script])

    def _kill(self, daemon: subprocess.Popen[bytes]) -> None:
        if daemon.poll() is None:
            os.killpg(daemon.pid, signal.SIGKILL)
        daemon.wait()

    def _start_daemon(self, name: str, command: Sequence[str]) -> None:
        # In a session of its own, against Ctrl-C and for killpg; and should the tests be killed
        # before they can stop it, the kernel does (setpriv).
        with (self.directory / f"{name}.err").open("wb") as errors:
            daemon = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                start_new_session=True,
            )
        self._daemons[name] = daemon

    def _all_idle(self) -> bool:
        states = self.run("sinfo", "--noheader", "--Node", "--format=%T").stdout.split()
        return states == ["idle"] * len(self.nodes)

    def _wait(self, condition: Callable[[], bool], deadline: float, complaint: str) -> None:
        while not condition():
            if time.monotonic() > deadline:
                logs = [*self.directory.glob("*.err"), *self.directory.glob("log/*.log")]
                tails = [f"{log.name}: {log.read_text()[-500:]}" for log in logs]
                raise RuntimeError("\n".join([complaint, *tails]))
            time.sleep(0.05)


def _free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
