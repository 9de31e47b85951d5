"""Training on several hosts that fail, all on this machine: `make hosts-test`.

    python -m bench.cluster.hosts                  # everything
    python -m bench.cluster.hosts only=cut         # cases whose name contains this; times=1 for fewer of each

Three hosts (`network.py`) with a rank each, under torchrun with its c10d rendezvous, on gloo. Each case must end with
the losses of the undisturbed run to 1e-5, or with one line that names the rank and its host, after which the same
command must get there. Figures go to bench/results/hosts-<machine>.json.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from bench.cluster import network, sandbox
from bench.cluster.network import Host
from bench.cluster.sandbox import TINY, Outcomes, Tried, errors_in, text, until
from bench.runs import STEADY, curve, difference, weights
from nanodisp import cli

TIMEOUT = 15.0  # seconds, of train.timeout_minutes
CLOSE = 1e-5
PATIENCE = 240.0  # for anything to end, on a busy machine
SKEWED = """
import os, runpy, sys, time
real = time.time
time.time = lambda: real() + float(os.environ["SKEW"])
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""
# torch 2.13 tells hosts that come later the address of its store only if it makes a new one for each rendezvous
REBUILT = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
SETTINGS = (
    *(each for each in TINY if not each.startswith(("data=", "train.batch_size", "train.checkpoint"))),
    *("data=text", "train.batch_size=6", "train.steps=80", "train.checkpoint_interval=5"),
    f"train.timeout_minutes={TIMEOUT / 60}",
)


class Job:
    """One run on some hosts: torchrun on each, with the rendezvous on the first.

    Args:
        separate: whether the run's folder is on each host's own disk, else on the disk that they share.
        script: what the ranks run.
    """

    def __init__(self, cases: Cases, name: str, separate: bool = False, script: str = "train.py") -> None:
        self.script = script
        self.folder, self.disk, self.name, self.separate = cases.folder, cases.disk, name, separate
        self.out = (self.disk if separate else self.folder) / "out"
        self.log = self.folder / f"{name}.log"
        self.agents: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, hosts: Sequence[Host], nodes: str, *settings: str) -> None:
        """Begin, or go on, on these hosts, with the rendezvous on the first of them."""
        self.meeting = hosts[0]
        for host in hosts:
            self.join(host, nodes, 0, *settings)

    def join(self, host: Host, nodes: str, restarts: int, *settings: str, **environment: str) -> None:
        rendezvous = (
            *("--rdzv-backend=c10d", f"--rdzv-endpoint={self.meeting.address}:29400", f"--rdzv-id={self.name}"),
            "--rdzv-conf=join_timeout=120,last_call_timeout=15,close_timeout=10,keep_alive_interval=1,"
            f"keep_alive_max_attempt=5,read_timeout=20,is_host={int(host is self.meeting)}",
        )
        torchrun = ("-m", "torch.distributed.run", *rendezvous, f"--nnodes={nodes}", f"--max-restarts={restarts}")
        data = (f"data.path={self.disk}/text.txt", f"data.folder={self.disk}/data")
        replicas = ("train.replicate_checkpoints=true",) * self.separate
        settings = (*SETTINGS, *data, *replicas, *settings, f"out_dir={self.out}", f"run_name={self.name}")
        command = [sys.executable, *torchrun, f"--local-addr={host.address}", self.script, *settings]
        self.agents[host.name] = host.start(self.log, command, **environment)

    def run_on(self, host: Host) -> Path:
        """The run's folder as that host sees it."""
        return (host.own_disk if self.separate else self.folder) / "out" / self.name

    def step(self, host: Host) -> int:
        return len(curve(self.run_on(host))) if (self.run_on(host) / "metrics.jsonl").exists() else 0

    def wait_for_step(self, host: Host, step: int) -> None:
        ended = lambda: any(agent.poll() is not None for agent in self.agents.values())  # noqa: E731
        until(lambda: self.step(host) >= step or ended(), PATIENCE, f"step {step}: {text(self.log)[-3000:]}", 0.02)

    def wait(self, but: Sequence[Host] = (), seconds: float = PATIENCE) -> bool:
        """Whether all agents, but those of lost hosts, end with 0; ends the test where they do not end."""
        lost = [host.name for host in but]
        agents = [agent for name, agent in self.agents.items() if name not in lost]
        until(
            lambda: all(agent.poll() is not None for agent in agents), seconds, f"{self.name}: {text(self.log)[-3000:]}"
        )
        return all(agent.returncode == 0 for agent in agents)

    def errors(self) -> list[str]:
        return [line for line in errors_in(text(self.log)) if "rank" in line]


class Cases:
    """Every case: a method whose name says what is done to the hosts."""

    def __init__(self, folder: Path, config: Tried) -> None:
        self.folder, self.times, self.rng = folder, config.times, random.Random(config.seed)
        self.outcomes = Outcomes("hosts")
        self.disk = folder / "disk"
        self.disk.mkdir()
        network.bridge()
        self.hosts = [self.host(number) for number in (1, 2, 3)]
        whole = Job(self, "whole")
        whole.start(self.hosts, "3")
        if not whole.wait():
            raise SystemExit(f"the undisturbed run failed: {text(whole.log)}")
        self.whole = curve(whole.run_on(self.hosts[0]))

    def host(self, number: int) -> Host:
        host = Host(number, self.folder, self.disk)
        words = random.Random(0).choices(["dispersion", "pushes", "them", "apart", "during", "training"], k=20_000)
        (host.own_disk / "text.txt").write_text(" ".join(words))
        return host

    def replace(self, host: Host) -> Host:
        """A new machine in place of one that is gone, with an empty disk."""
        shutil.rmtree(host.own_disk)
        self.hosts[host.number - 1] = self.host(host.number)
        return self.hosts[host.number - 1]

    def same(self, run: Path) -> float:
        return difference(curve(run), self.whole)

    def some_step(self) -> int:
        return self.rng.randrange(8, 50)

    def note(self, fault: str, errors: Sequence[float], ended: str) -> None:
        good = [error <= CLOSE for error in errors]
        self.outcomes.note(fault, good, f"{ended}; the curve of the undisturbed run to {max(errors):.1e}")

    # --- what does not disturb

    def separate_disks(self) -> None:
        """Each host prepares its own data and keeps its own folder of the run."""
        job = Job(self, "separate", separate=True)
        job.start(self.hosts, "3")
        good = job.wait() and len({weights(job.run_on(host)) for host in self.hosts}) == 1
        errors = [self.same(job.run_on(host)) if good else float("inf") for host in self.hosts]
        self.note("separate disks (3 hosts)", errors, "data prepared on each, the same checkpoint on each")

    def late(self) -> None:
        """A host that joins 15 seconds after the others."""
        job = Job(self, "late")
        job.start(self.hosts[:2], "3")
        time.sleep(15)
        job.join(self.hosts[2], "3", 0)
        self.note(
            "a host joins 15 s late", [self.same(job.run_on(self.hosts[0])) if job.wait() else 9], "the others waited"
        )

    def clocks(self) -> None:
        """The clocks of the ranks a day and an hour off, and the times of the run's files too before it goes on.

        Not torchrun's, which compares the clocks of hosts itself: they must agree to some seconds.
        """
        (self.folder / "skewed.py").write_text(SKEWED)
        errors = []
        for number in range(self.times):
            job = Job(self, f"clocks-{number}", script=str(self.folder / "skewed.py"))
            for steps in ("train.steps=40", "train.steps=80"):
                job.meeting = self.hosts[0]
                for host, skew in zip(self.hosts, ("0", "86400", "-3600"), strict=True):
                    job.join(host, "3", 0, steps, *STEADY, "optim.lr=1e-3", SKEW=skew)
                good = job.wait()
                for file in job.run_on(self.hosts[0]).rglob("*"):
                    moved = time.time() + self.rng.choice((-1, 1)) * 86400
                    os.utime(file, (moved, moved))
            errors.append(difference(curve(job.run_on(self.hosts[0])), self.constant()) if good else 9)
        self.note("clocks of ranks and files a day ahead, an hour behind", errors, "nothing")

    def constant(self) -> list[float]:
        """The curve of an undisturbed run with a constant learning rate, the same for any number of steps."""
        job = Job(self, "constant")
        if not (job.run_on(self.hosts[0]) / "metrics.jsonl").exists():
            job.start(self.hosts, "3", *STEADY, "optim.lr=1e-3")
            job.wait()
        return curve(job.run_on(self.hosts[0]))

    def loss_and_delay(self) -> None:
        """Every cable loses frames and delays the rest."""
        errors = []
        for number in range(self.times):
            job = Job(self, f"lossy-{number}")
            for host in self.hosts:
                host.cable.loss, host.cable.delay = 0.03, 0.002
            job.start(self.hosts, "3")
            errors.append(self.same(job.run_on(self.hosts[0])) if job.wait() else 9)
            for host in self.hosts:
                host.cable.loss = host.cable.delay = 0.0
        self.note("3% of the packets lost, 1 to 3 ms delay, on all links", errors, "slower")

    def cut_shortly(self) -> None:
        """A link cut for a third of the timeout."""
        errors = []
        for number in range(self.times):
            job = Job(self, f"cut-shortly-{number}")
            job.start(self.hosts, "3")
            job.wait_for_step(self.hosts[0], self.some_step())
            self.hosts[1].cable.is_cut = True
            time.sleep(TIMEOUT / 3)
            self.hosts[1].cable.is_cut = False
            errors.append(self.same(job.run_on(self.hosts[0])) if job.wait() else 9)
        self.note(f"a link cut for {TIMEOUT / 3:.0f} s (timeout {TIMEOUT:.0f} s)", errors, "training waited")

    # --- what ends a run, or a part of it

    def cut_long(self) -> None:
        """A link cut for longer than the timeout: one line, then the same command."""
        self._ends(
            "cut-long",
            f"a link cut for good (timeout {TIMEOUT:.0f} s)",
            lambda host: setattr(host.cable, "is_cut", True),
        )

    def killed(self) -> None:
        """A host that loses power."""
        self._ends("host-killed", "a host loses power", lambda host: host.kill())

    def _ends(self, name: str, fault: str, disturb: Callable[[Host], object]) -> None:
        errors, lines, slowest = [], set(), 0.0
        for number in range(self.times):
            job, victim = Job(self, f"{name}-{number}"), self.hosts[2]
            job.start(self.hosts, "3")
            job.wait_for_step(self.hosts[0], self.some_step())
            disturb(victim)
            began = time.monotonic()
            job.wait(but=[victim])
            slowest = max(slowest, time.monotonic() - began)
            found = [
                line for line in job.errors() if f"rank {self.rank_of(job, victim)} on {victim.name} is gone" in line
            ]
            lines |= set(found)
            if victim.life.poll() is None:
                victim.kill()
            self.replace(victim)
            again = Job(self, f"{name}-{number}")
            again.start(self.hosts, "3")
            errors.append(self.same(job.run_on(self.hosts[0])) if again.wait() and found else 9)
        ended = f"the others ended within {slowest:.0f} s: {sorted(lines)}; the same command resumed"
        self.note(fault, errors, ended)

    def rank_of(self, job: Job, host: Host) -> str:
        """A host's rank, which torchrun chose; from the line that names it."""
        found = re.search(rf"rank (\d) on {host.name} ", text(job.log))
        return found[1] if found else "?"

    def first_lost(self) -> None:
        """The host with rank 0, the rendezvous and the newest records is lost, disk and all; the others go on."""
        errors, lines = [], set()
        for number in range(self.times):
            job, (first, *others) = Job(self, f"first-lost-{number}", separate=True), self.hosts
            job.start(self.hosts, "3")
            job.wait_for_step(others[0], self.some_step())
            first.kill()
            until(partial(names, job.log, "h1"), 120, f"the others name h1: {text(job.log)[-2000:]}")
            lines |= set(job.errors())
            for host in others:  # torchrun waits for its rendezvous for minutes, see docs/distributed.md
                host.end_processes()
            self.replace(first)
            again = Job(self, f"first-lost-{number}", separate=True)
            again.start(others, "2")
            errors.append(
                self.same(job.run_on(others[0])) if again.wait() and "resuming from step" in text(job.log) else 9
            )
        self.note("rank 0's host lost with its disk, two others take over", errors, f"{sorted(lines)}; they resumed")

    # --- elastic

    def elastic(self) -> None:
        """--nnodes=1:3: three hosts, then one, then two."""
        long = ("train.steps=3000", "train.checkpoint_interval=50", "optim.lr=1e-4")  # no chaos in so many steps
        whole = Job(self, "elastic-whole")
        whole.start(self.hosts[:1], "1", *long)
        good, right, errors, seen = whole.wait(seconds=600), curve(whole.run_on(self.hosts[0])), [], ""
        for number in range(self.times):
            job, (first, second, third) = Job(self, f"elastic-{number}", separate=True), self.hosts
            job.meeting = first
            for host in self.hosts:
                job.join(host, "1:3", 9, *long, **REBUILT)
            until(partial(ran_on, job.log, "3"), PATIENCE, f"three hosts begin: {text(job.log)[-3000:]}")
            job.wait_for_step(first, job.step(first) + self.rng.randrange(60, 200))
            second.kill()
            third.kill()
            until(partial(ran_on, job.log, "1"), PATIENCE, f"one host goes on: {text(job.log)[-3000:]}")
            second, third = self.replace(second), self.replace(third)
            job.join(second, "1:3", 9, *long, **REBUILT)
            good = job.wait(but=[third], seconds=900)
            seen = ", ".join(sizes(job.log))
            errors.append(difference(curve(job.run_on(first)), right) if good and sizes(job.log)[-1] == "2" else 9)
        self.note(
            "elastic, --nnodes=1:3 --max-restarts=9: two of 3 hosts lost, one comes back", errors, f"ranks: {seen}"
        )


def sizes(log: Path) -> list[str]:
    """On how many ranks a run was, each time that it began or went on."""
    return re.findall(r"tokens, (\d) x cpu", text(log))


def names(log: Path, host: str) -> bool:
    return any(host in line for line in errors_in(text(log)))


def ran_on(log: Path, ranks: str) -> bool:
    return ranks in sizes(log)


def main(argv: Sequence[str]) -> None:
    config = cli.parse(Tried, argv)
    began = time.monotonic()
    order = ("separate_disks", "late", "clocks", "loss_and_delay", "cut_shortly", "cut_long", "killed", "first_lost")
    with tempfile.TemporaryDirectory() as name:
        cases = Cases(Path(name), config)
        for case in (*order, "elastic"):
            if config.only is None or any(part in case for part in config.only.split(",")):
                try:
                    getattr(cases, case)()
                except SystemExit as error:  # it waited in vain: the other cases get new hosts
                    cases.outcomes.note(case, [False], str(error))
                    for host in list(cases.hosts):
                        host.kill()
                        cases.replace(host)
        cases.outcomes.finish(began)


if __name__ == "__main__":
    if not cli.asks_for_help(sys.argv[1:]):
        if shutil.which("ip") is None or shutil.which("nsenter") is None or not Path("/dev/net/tun").exists():
            sandbox.skip("bench.cluster.hosts needs ip (iproute2), nsenter (util-linux) and /dev/net/tun")
        sandbox.enter("bench.cluster.hosts", "--net")
    cli.run(main, Tried)
