"""A Slurm cluster of two nodes on this machine: real daemons, all of their files in one folder.

The programs come from Debian's ``slurm-wlm`` and ``munge``. Needs root, as slurmd does.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.distributed.ranks import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
NODES = ("n1", "n2")
# Seconds in which several processes have started Python and torch, on a busy machine too.
PATIENCE = 180.0
# Seconds: until the daemons answer, and until a job that was cancelled is gone.
START, STOP = 20.0, 10.0
_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
_CONF = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1
ReturnToService=0
SlurmdParameters=config_overrides
KillWait=30
JobRequeue=1
{nodes}
PartitionName=main Nodes={names} Default=YES MaxTime=INFINITE State=UP
"""
# More processors than there may be: with config_overrides the nodes only claim them, and jobs may overlap.
_NODE = "NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=8 RealMemory=1000"


def why_not() -> str | None:
    """Why no cluster can be started here, or None."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
    if missing:
        return f"needs {', '.join(missing)}: apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "needs root, which starts slurmd"


class Cluster:
    """Runs from construction until ``close``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            # Nothing of a job in which the tests themselves may run.
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))},
            "PATH": _PATH,
            "SLURM_CONF": str(folder / "slurm.conf"),
        }
        self._daemons: list[subprocess.Popen[bytes]] = []
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def run(self, *command: str | Path, cwd: Path | None = None) -> str:
        """Standard output of a command that succeeds."""
        words = [str(word) for word in command]
        done = subprocess.run(words, env=self.environment, cwd=cwd, capture_output=True, text=True)
        assert done.returncode == 0, f"{words}: {done.stderr}{done.stdout}"
        return done.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """What the controller knows about a job, as ``scontrol show job`` names it."""
        fields = self.run("scontrol", "--oneliner", "show", "job", job_id).split()
        return dict(field.partition("=")[::2] for field in fields)

    def release(self, job_id: str, restarts: int) -> None:
        """Waits until a job was requeued, and starts it: Slurm would hold it back for two minutes."""

        def requeued() -> bool:
            job = self.job(job_id)
            return job["Restarts"] == str(restarts) and job["JobState"] == "PENDING"

        self.wait_for(f"job {job_id} was requeued {restarts} times", requeued)
        # Not in the same second: the nodes would take the new attempt's credential for the revoked one.
        self.run("scontrol", "update", f"JobId={job_id}", "StartTime=now+2")

    def finish(self, job_id: str) -> dict[str, str]:
        """Waits until a job is over, and returns what is known about it."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.wait_for(f"job {job_id} is over", lambda: self.job(job_id)["JobState"] in over)
        return self.job(job_id)

    def wait_for(self, what: str, reached: Callable[[], object], seconds: float = PATIENCE) -> None:
        """Looks ten times a second; fails, with the logs of the daemons, when it takes too long."""
        deadline = time.monotonic() + seconds
        while not reached():
            if time.monotonic() > deadline:
                raise AssertionError(f"after {seconds:.0f} s still not: {what}\n{self._state()}")
            time.sleep(0.1)

    def processes(self, program: str, **variables: str) -> list[int]:
        """Ids of the processes of this cluster and its jobs whose command line and environment hold these."""
        # All of them, and nobody else, have its configuration in their environment.
        variables["SLURM_CONF"] = self.environment["SLURM_CONF"]
        wanted = {f"{name}={value}".encode() for name, value in variables.items()}
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal():
                continue
            try:
                environment = set((entry / "environ").read_bytes().split(b"\0"))
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:  # gone meanwhile
                continue
            if wanted <= environment and program in command:
                found.append(int(entry.name))
        return found

    def close(self) -> None:
        """Ends all jobs and daemons; nothing survives."""
        if self._daemons:
            subprocess.run(["scancel", "--user", "root"], env=self.environment, capture_output=True)
            deadline = time.monotonic() + STOP
            while self._queue() and time.monotonic() < deadline:
                time.sleep(0.1)
        # At once: they keep nothing that is needed again, and would wait for each other.
        for daemon in self._daemons:
            daemon.kill()
            daemon.wait()
        for pid in self.processes(""):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _start(self) -> None:
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        nodes = [_NODE.format(name=name, port=free_port()) for name in NODES]
        conf = _CONF.format(
            folder=self.folder, controller=free_port(), nodes="\n".join(nodes), names=",".join(NODES)
        )
        (self.folder / "slurm.conf").write_text(conf)
        files = {"key": "key", "socket": "socket", "pid": "pid", "seed": "seed", "log": "messages"}
        options = [
            f"--{'key' if name == 'key' else name}-file={self.folder}/munge.{end}"
            for name, end in files.items()
            if name != "socket"
        ]
        # --force: pytest's folders are closed to others, which munged would refuse.
        self._spawn("munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *options)
        self.wait_for("munged listens", (self.folder / "munge.socket").exists, START)
        self._spawn("slurmctld", "-D")
        for node in NODES:
            self._spawn("slurmd", "-D", "-N", node)
        self.wait_for("both nodes are idle", self._idle, START)

    def _queue(self) -> str:
        asked = subprocess.run(
            ["squeue", "--noheader"], env=self.environment, capture_output=True, text=True, timeout=STOP
        )
        return asked.stdout

    def _state(self) -> str:
        """What explains a wait in vain: the queue, and the ends of the daemons' logs."""
        logs = [path for path in sorted(self.folder.glob("*.log")) if path.stat().st_size]
        return "\n".join([self._queue(), *(f"== {path.name}\n{path.read_text()[-1500:]}" for path in logs)])

    def _spawn(self, program: str, *options: str) -> None:
        log = self.folder / f"{'-'.join([program, *options[-1:]]) if program == 'slurmd' else program}.log"
        path = shutil.which(program, path=_PATH)
        assert path is not None
        with open(log, "wb") as output:
            self._daemons.append(
                subprocess.Popen(
                    [path, *options],
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    # A Ctrl-C at the terminal is for pytest, which then closes the cluster.
                    start_new_session=True,
                )
            )

    def _idle(self) -> bool:
        asked = subprocess.run(
            ["sinfo", "--noheader", "--format=%T %D"], env=self.environment, capture_output=True, text=True
        )
        return asked.stdout.split() == ["idle", str(len(NODES))]
