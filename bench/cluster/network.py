"""Hosts on this machine: Linux namespaces, each with its address, processes, /dev/shm and disk, joined by a bridge.

    10.77.0.1 h1 ── cable ──┐
    10.77.0.2 h2 ── cable ──┼── bridge, in a network namespace of its own: nothing leaves it
    10.77.0.3 h3 ── cable ──┘

A cable is a thread that carries Ethernet frames between two TAP devices, one in the host and one in the bridge; it
can be cut, and can lose and delay frames. The kernel's own netem does that too, but many kernels are built without it.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from bench.cluster.sandbox import until

SET_TAP, TAP, NO_HEADER = 0x400454CA, 0x0002, 0x1000  # TUNSETIFF, IFF_TAP, IFF_NO_PI of linux/if_tun.h
FRAME = 1 << 16
INSIDE = ("--net", "--mount", "--uts", "--ipc", "--pid")  # namespaces of a host


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def bridge() -> None:
    """In a network namespace of our own, see `sandbox.enter`."""
    ip("link", "set", "lo", "up")
    ip("link", "add", "bridge", "type", "bridge")
    ip("link", "set", "bridge", "up")


def tap(name: str) -> int:
    """A new TAP device; its frames are read from and written to the file descriptor."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, SET_TAP, struct.pack("16sH", name.encode(), TAP | NO_HEADER))
    return descriptor


class Cable:
    """Carries frames between two TAP devices.

    Attributes:
        is_cut: nothing passes.
        loss: share of the frames that vanish.
        delay: seconds that a frame takes, from half to one and a half times this.
    """

    def __init__(self, ends: tuple[int, int], seed: int) -> None:
        self.ends, self.rng = ends, random.Random(seed)
        self.is_cut, self.loss, self.delay = False, 0.0, 0.0
        self.unplugged = threading.Event()

    def plug_in(self) -> None:
        """Once both devices are up; reading from one that is down fails."""
        threading.Thread(target=self._carry, daemon=True).start()

    def _carry(self) -> None:
        waiting: list[tuple[float, int, int, bytes]] = []  # due, number, to which end, frame
        number = 0
        while not self.unplugged.is_set():
            patience = min(0.5, max(0.0, waiting[0][0] - time.monotonic())) if waiting else 0.5
            for end in select.select(self.ends, (), (), patience)[0]:
                try:
                    frame = os.read(end, FRAME)
                except OSError:  # its host is gone
                    return
                if self.is_cut or self.rng.random() < self.loss:
                    continue
                number += 1
                due = time.monotonic() + self.delay * self.rng.uniform(0.5, 1.5)
                heapq.heappush(waiting, (due, number, self.ends[1 - self.ends.index(end)], frame))
            while waiting and waiting[0][0] <= time.monotonic():
                _, _, to, frame = heapq.heappop(waiting)
                try:
                    os.write(to, frame)
                except BlockingIOError:  # its queue is full, as a switch's may be: the frame is lost
                    pass
                except OSError:
                    return


class Host:
    """A machine.

    Args:
        number: from 1; decides the name and the address.
        folder: on the machine that all hosts share. `disk`, a path that is the same on all hosts, is another
            folder on each.
    """

    def __init__(self, number: int, folder: Path, disk: Path) -> None:
        self.number, self.name, self.address = number, f"h{number}", f"10.77.0.{number}"
        self.own_disk, self.folder = folder / f"disk-{self.name}", folder
        self.own_disk.mkdir(exist_ok=True)
        names = "; ".join(f"echo 10.77.0.{n} h{n} >> {folder}/hosts" for n in range(1, 5))
        begin = f"hostname {self.name}; mount -t tmpfs shm /dev/shm; mount --bind {self.own_disk} {disk}"
        begin += f"; echo 127.0.0.1 localhost > {folder}/hosts; {names}; mount --bind {folder}/hosts /etc/hosts"
        unshare = ["unshare", *INSIDE, "--fork", "--kill-child", "--mount-proc"]
        self.ready = folder / f"ready-{self.name}"
        self.ready.unlink(missing_ok=True)
        self.life = subprocess.Popen([*unshare, "sh", "-c", f"{begin}; touch {self.ready}; exec sleep 100000"])
        until(self.ready.exists, 20, f"{self.name} starts")
        self.pid = Path(f"/proc/{self.life.pid}/task/{self.life.pid}/children").read_text().split()[0]
        outer, inner = f"port{number}", f"plug{number}"
        self.cable = Cable((tap(outer), tap(inner)), number)
        ip("link", "set", outer, "master", "bridge", "up")
        ip("link", "set", inner, "netns", self.pid, "name", "eth0")
        for command in (
            "link set lo up",
            f"addr add {self.address}/24 dev eth0",
            "link set eth0 up",
        ):
            subprocess.run(["nsenter", "-t", self.pid, "--net", "ip", *command.split()], check=True)
        self.cable.plug_in()
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, log: Path, command: Sequence[str], **environment: str) -> subprocess.Popen[bytes]:
        """A command on this host, its output appended to `log`."""
        enter = ["nsenter", "-t", self.pid, *INSIDE, f"--wdns={Path.cwd()}", "env"]
        given = [f"{key}={value}" for key, value in {"GLOO_SOCKET_IFNAME": "eth0", **environment}.items()]
        with log.open("ab") as file:
            self.processes.append(subprocess.Popen([*enter, *given, *command], stdout=file, stderr=file))
        return self.processes[-1]

    def end_processes(self) -> None:
        """All of them, at once; the host stays."""
        kill_all = ["nsenter", "-t", self.pid, "--pid", "--mount", "sh", "-c", "kill -KILL -1"]
        subprocess.run(kill_all, stderr=subprocess.DEVNULL)

    def kill(self) -> None:
        """As if its power failed: no process says goodbye, and no packet leaves it any more."""
        if self.life.poll() is not None:
            return
        self.cable.is_cut = True
        self.life.kill()
        self.life.wait()
        for process in self.processes:
            process.wait()
        self.cable.unplugged.set()
        time.sleep(0.6)  # the thread notices
        for end in self.cable.ends:
            os.close(end)
