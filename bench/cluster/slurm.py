"""Training under SLURM, with a real slurmctld and four slurmd on this machine: `make slurm-test`.

    python -m bench.cluster.slurm                    # everything
    python -m bench.cluster.slurm only=cancelled     # cases whose name contains this; times=1 for fewer of each

Installs Debian's slurm-wlm and munge if they are missing (root), and writes a configuration for four nodes of four
CPUs and two stand-ins for GPUs into a temporary folder. The jobs are those of examples/slurm/train.sbatch, unchanged,
on two nodes with a rank each, and a sweep through hydra/launcher=slurm. What is disturbed must end with the weights
and the losses of an undisturbed job, bit for bit. Figures go to bench/results/slurm-<machine>.json.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

from bench.cluster.sandbox import TINY, Outcomes, Tried, enter, errors_in, skip, text, until
from bench.runs import ROOT, checkpoints_of, curve, weights
from nanodisp import cli

NODES = ("n1", "n2", "n3", "n4")
ONE_RANK_A_NODE = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")  # not 2 x 8
LARGE = ("model.n_embd=1024", "train.checkpoint_interval=1", "train.steps=24")  # 300 MB a step: always saving
STEPS = "train.steps=60"
LONGER = 2500  # steps of more than that limit
CONFIGURATION = """
ClusterName=nanodisp
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=16817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits for as long as a credential is valid.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
MailProg=/bin/true
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
SlurmdTimeout=15
KillWait=15
ReturnToService=2
GresTypes=gpu
NodeName=n[1-4] NodeHostname={host} NodeAddr=127.0.0.1 Port=17001-17004 Sockets=1 CoresPerSocket=4 ThreadsPerCore=1 \
RealMemory=4000 Gres=gpu:2
PartitionName=all Nodes=ALL Default=YES State=UP OverSubscribe=NO
"""


def install() -> None:
    """Debian's packages, or the reason why not."""
    if find_spec("submitit") is None:
        skip("the slurm launcher is missing: pip install -e '.[slurm]'")
    if shutil.which("slurmctld") and shutil.which("slurmd") and shutil.which("munged"):
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        skip("slurmctld, slurmd or munged is missing: install slurm-wlm and munge, or run this as root on Debian")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", "slurm-wlm", "munge"]):
        done = subprocess.run(["apt-get", *command], capture_output=True, env=environment)
        if done.returncode != 0:
            skip(f"apt-get {command[0]} failed: {done.stderr.decode(errors='replace').strip().splitlines()[-1:]}")


class Cluster:
    """The daemons. As a context, they are stopped at its end by their pids."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Cluster:
        folder = self.folder
        folder.chmod(0o755)
        (folder / "state").mkdir()
        (folder / "slurm.conf").write_text(CONFIGURATION.format(host=socket.gethostname(), folder=folder))
        (folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o600)
        (folder / "hosts").write_text(Path("/etc/hosts").read_text() + f"127.0.0.1 {' '.join(NODES)}\n")
        subprocess.run(["mount", "--bind", folder / "hosts", "/etc/hosts"], check=True)  # in this namespace only
        os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
        os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # for the script's `python`
        files = ("socket", "pid-file=munge.pid", "log-file=munge.log", "seed-file=munge.seed", "key-file=munge.key")
        named = [f"--{each.partition('=')[0]}={folder / (each.partition('=')[2] or 'munge.socket')}" for each in files]
        self._start("munged", "munged", "--force", "--foreground", *named)
        until((folder / "munge.socket").exists, 20, "munged starts")
        self._start("slurmctld", "slurmctld", "-D", "-i")
        for node in NODES:
            self.start_node(node)
        self.wait_for_nodes()
        return self

    def __exit__(self, *exception: object) -> None:
        for name in reversed(list(self.daemons)):
            self.stop(name)

    def _start(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.daemons[name] = subprocess.Popen(command, stdout=log, stderr=log)

    def start_node(self, node: str) -> None:
        """A slurmd in a PID namespace of its own, so that its jobs end with it, as on a machine that loses power."""
        apart = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
        self._start(node, *apart, "slurmd", "-D", "-N", node)

    def stop(self, name: str) -> None:
        daemon = self.daemons.pop(name)
        if name not in NODES:
            daemon.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            daemon.wait(timeout=0 if name in NODES else 20)
        daemon.kill()
        daemon.wait()

    def wait_for_nodes(self) -> None:
        """Until all are idle."""

        def idle() -> bool:
            return slurm("sinfo", "--noheader", "--format=%T").split() == ["idle"]

        until(idle, 90, f"all nodes are idle: {slurm('sinfo')}")


def slurm(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout


class Job:
    """A job of the example script."""

    def __init__(self, out: Path, run: str, *settings: str, options: Sequence[str] = ()) -> None:
        self.run, self.log = out / run, out / f"{run}-{time.monotonic_ns()}.log"
        script = ("examples/slurm/train.sbatch", *TINY, f"out_dir={out}", f"run_name={run}", *settings)
        command = ["sbatch", "--parsable", f"--output={self.log}", *ONE_RANK_A_NODE, *options, *script]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        if done.returncode != 0:
            raise SystemExit(f"sbatch: {done.stderr}")
        self.id = done.stdout.strip()

    def field(self, name: str) -> str:
        found = re.search(rf"\b{name}=(\S+)", slurm("scontrol", "show", "job", "--oneliner", self.id))
        return found[1] if found else ""

    def is_over(self) -> bool:
        return self.field("JobState") in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

    def wait(self, seconds: float = 300) -> str:
        """Its final state; a job that is requeued is not over."""
        until(self.is_over, seconds, f"job {self.id} ends: {slurm('squeue')}{text(self.log)[-2000:]}", every=0.5)
        return self.field("JobState")

    def wait_for_step(self, step: int) -> None:
        until(lambda: self.is_over() or len(self.losses()) >= step, 120, f"step {step}: {text(self.log)[-2000:]}", 0.02)

    def losses(self) -> list[float]:
        return curve(self.run) if (self.run / "metrics.jsonl").exists() else []

    def ranks(self) -> list[int]:
        """The processes of its ranks."""
        mine = f"^[^ ]*python train.py .*run_name={self.run.name}( |$)"
        return [int(pid) for pid in subprocess.run(["pgrep", "-f", mine], capture_output=True).stdout.split()]

    def is_saving(self) -> bool:
        return any((self.run / "checkpoints").glob(".step_*.tmp"))


class Cases:
    """Every case: a method whose name says what is done to a job."""

    def __init__(self, cluster: Cluster, out: Path, config: Tried) -> None:
        self.cluster, self.out, self.times, self.rng = cluster, out, config.times, random.Random(config.seed)
        self.outcomes = Outcomes("slurm")
        whole = Job(out, "whole", STEPS)
        if whole.wait() != "COMPLETED":
            raise SystemExit(f"an undisturbed job failed: {text(whole.log)}")
        self.whole = whole.run

    def same(self, run: Path, whole: Path | None = None) -> bool:
        """Whether a run ended with the weights and the losses of the undisturbed one."""
        whole = whole or self.whole
        return weights(run) == weights(whole) and curve(run) == curve(whole)

    def time_limit(self) -> None:
        """A limit of two minutes, USR1 before it."""
        longer = (f"train.steps={LONGER}", "train.checkpoint_interval=500")
        whole = Job(self.out, "long-whole", *longer, options=["--time=10"])
        if whole.wait(600) != "COMPLETED":
            raise SystemExit(text(whole.log))
        job = Job(self.out, "long", *longer, options=["--time=2", "--signal=USR1@45"])
        state = job.wait(900)
        requeued, saved = int(job.field("Restarts")), text(job.log).count("SIGUSR1: saved")
        good = state == "COMPLETED" and saved > 0 and self.same(job.run, whole.run)
        if not good:
            print(state, len(curve(job.run)), self.same(job.run, whole.run), text(job.log)[-3000:])
        ended = f"requeued {requeued} times, {saved} of them after a save; bit-identical"
        self.outcomes.note("time limit of 2 minutes, SIGUSR1 before it", [good], ended)

    def preempted(self) -> None:
        """SIGUSR1 at random steps, twice a job."""
        good, saved = [], 0
        for number in range(self.times):
            job = Job(self.out, f"preempted-{number}", STEPS)
            for earliest in (1, 25):
                job.wait_for_step(earliest + self.rng.randrange(15))
                slurm("scancel", "--signal=USR1", job.id)
                until(lambda job=job: job.is_over() or job.field("JobState") == "PENDING", 60, "requeued")  # type: ignore[misc]
            state = job.wait()
            saved += text(job.log).count("SIGUSR1: saved")
            good.append(state == "COMPLETED" and int(job.field("Restarts")) > 0 and self.same(job.run))
        self.outcomes.note("SIGUSR1 at a random step", good, f"saved, requeued, resumed {saved} times; bit-identical")

    @cached_property
    def large(self) -> Path:
        """An undisturbed run of a model whose save takes longer than a command of SLURM's."""
        whole = Job(self.out, "large-whole", *LARGE)
        if whole.wait(600) != "COMPLETED":
            raise SystemExit(text(whole.log))
        return whole.run

    def cancelled(self) -> None:
        """Cancelled while a checkpoint is being written: scancel sends SIGTERM first; the same command resumes."""
        good, whole = [], self.large
        for number in range(self.times):
            job = self._saving(f"cancelled-{number}")
            slurm("scancel", job.id)
            ended = job.wait() in ("CANCELLED", "FAILED")
            time.sleep(2)
            stays = job.is_over() and job.field("Restarts") == "0"
            again = Job(self.out, job.run.name, *LARGE)
            good.append(ended and stays and again.wait(600) == "COMPLETED" and self.same(job.run, whole))
        how = "ended, not requeued; sbatch again resumed, bit-identical"
        self.outcomes.note("scancel in the middle of a save", good, how)

    def killed_saving(self) -> None:
        """All ranks get SIGKILL while a checkpoint is being written."""
        good, whole = [], self.large
        for number in range(self.times):
            job = self._saving(f"killed-saving-{number}")
            slurm("scancel", "--signal=KILL", f"{job.id}.0")
            until(lambda job=job: not job.ranks(), 60, "the ranks end", every=0.01)  # type: ignore[misc]
            unfinished = job.is_saving()
            state = job.wait(600)
            requeued = state == "COMPLETED" and job.field("Restarts") == "1"
            good.append(unfinished and requeued and self.same(job.run, whole))
        ended = "an unfinished save was left; requeued, resumed, bit-identical"
        self.outcomes.note("all ranks killed in the middle of a save", good, ended)

    def _saving(self, run: str) -> Job:
        """A job at a random step that is just saving."""
        job = Job(self.out, run, *LARGE)
        job.wait_for_step(self.rng.randrange(3, 15))
        until(job.is_saving, 60, "a save begins", every=0.0005)
        return job

    def one_folder(self) -> None:
        """Two jobs that write into one folder."""
        good, lines = [], set()
        for number in range(self.times):
            jobs = [Job(self.out, f"shared-{number}", STEPS) for _ in range(2)]
            states = sorted(job.wait() for job in jobs)
            found = [errors_in(text(job.log)) for job in jobs if job.field("JobState") == "FAILED"]
            lines |= {re.sub(r"/\S*/", "…/", line) for each in found for line in each}
            good.append(states == ["COMPLETED", "FAILED"] and self.same(jobs[0].run) and len(found[0]) == 1)
        self.outcomes.note("two jobs into one folder", good, f"one completed; the other: {'; '.join(sorted(lines))}")

    def killed(self) -> None:
        """A rank gets SIGKILL, as from a system that is out of memory."""
        good = []
        for number in range(self.times):
            job = Job(self.out, f"killed-{number}", STEPS)
            job.wait_for_step(self.rng.randrange(3, 40))
            os.kill(self.rng.choice(job.ranks()), signal.SIGKILL)
            state = job.wait()
            named = any("is gone" in line for line in errors_in(text(job.log)))
            good.append(state == "COMPLETED" and job.field("Restarts") == "1" and named and self.same(job.run))
        self.outcomes.note("a rank killed", good, "the other named it; requeued, resumed, bit-identical")

    def node_lost(self) -> None:
        """A node with all its processes; the job goes on on another one."""
        good = []
        for number in range(self.times):
            job = Job(self.out, f"lost-{number}", STEPS)
            job.wait_for_step(self.rng.randrange(3, 40))
            node = self.rng.choice(NODES[:2])
            self.cluster.stop(node)
            state = job.wait()
            good.append(state == "COMPLETED" and int(job.field("Restarts")) > 0 and self.same(job.run))
            self.cluster.start_node(node)
            self.cluster.wait_for_nodes()
        self.outcomes.note(
            "a node lost with all its processes", good, "requeued on other nodes, resumed, bit-identical"
        )

    def sweep(self) -> None:
        """Four jobs through the launcher, one of which cannot work."""
        settings = [*TINY, STEPS, f"out_dir={self.out / 'sweep'}", "hydra/launcher=slurm", "model.n_head=1,2,3,4"]
        launcher = ["gpus_per_node=1", "cpus_per_task=1", "mem_gb=1", "timeout_min=5", "partition=all"]
        settings = [each for each in settings if each != "model.n_head=2"]
        command = [sys.executable, "train.py", "-m", *settings, *(f"hydra.launcher.{each}" for each in launcher)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
        complete = [run for run in (self.out / "sweep").iterdir() if checkpoints_of(run)]
        lines = errors_in(done.stderr)
        good = done.returncode == 2 and len(complete) == 3 and len(lines) == 1 and "n_head=3" in lines[0]
        if not good:
            print(done.stdout[-3000:], done.stderr[-3000:])
        self.outcomes.note("hydra/launcher=slurm: 4 jobs, one failing", [good], f"3 complete, exit code 2, {lines}")


def main(argv: Sequence[str]) -> None:
    config = cli.parse(Tried, argv)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name, Cluster(Path(name)) as cluster:
        out = Path(name) / "out"
        out.mkdir()
        cases = Cases(cluster, out, config)
        order = ("sweep", "time_limit", "preempted", "cancelled", "killed_saving", "one_folder", "killed", "node_lost")
        for case in order:
            if config.only is None or any(part in case for part in config.only.split(",")):
                getattr(cases, case)()
        cases.outcomes.finish(began)


if __name__ == "__main__":
    if not cli.asks_for_help(sys.argv[1:]):
        install()
        enter("bench.cluster.slurm")
    cli.run(main, Tried)
