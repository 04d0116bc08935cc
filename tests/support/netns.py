"""Machines of a cluster as network namespaces of this one: Ray nodes that talk over links that can be cut."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil

RAY = Path(sys.executable).parent / "ray"
PORT = 6379
DEADLINE_S = 120.0


def is_possible() -> bool:
    """Whether this process may make network namespaces."""
    if os.geteuid() or shutil.which("ip") is None:
        return False
    name = f"pmd{secrets.token_hex(3)}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return made


class Machines:
    """Namespaces whose `eth0` lead to one router, each with a Ray node or none; the first one has Ray's head.

    Example:
        >>> with Machines() as machines:                          # doctest: +SKIP
        ...     machines.start("a", cpus=3)
        ...     machines.start("b", cpus=3)
        ...     subprocess.run([*machines.inside("a"), "ping", "-c", "1", machines.address("b")])
    """

    def __init__(self) -> None:
        """Make nothing yet."""
        self._id = f"pmd{secrets.token_hex(3)}"
        self._names: list[str] = []
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        self.env = {
            # What Ray asks of every node and driver of a cluster with tokens.
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16),
            # Of the head: packets go on to be lost for a while after a link is mended, as TCP waits ever longer.
            "RAY_health_check_failure_threshold": "10",
            # Of every node and driver: else whoever is called gives up a connection that is silent for 20 s.
            "RAY_grpc_keepalive_timeout_ms": "60000",
            "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip

    def __enter__(self) -> Self:
        """The router."""
        self._ip("netns", "add", self._id)
        self._forward("all", "1")
        return self

    def __exit__(self, *_: object) -> None:
        """Kill every node, remove every namespace."""
        for name in list(self._nodes):
            self.kill(name)
        for space in (*map(self._space, self._names), self._id):
            subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)

    def address(self, name: str) -> str:
        """Of a machine."""
        return f"10.77.{self._names.index(name)}.2"

    def inside(self, name: str) -> list[str]:
        """What a command begins with that runs there."""
        return ["ip", "netns", "exec", self._space(name)]

    def start(self, name: str, *, cpus: int, resources: str = "{}") -> None:
        """Start Ray there, on a machine that is made if it is new; waits until it has joined."""
        if name not in self._names:
            self._add(name)
        is_head = self._names[0] == name
        where = ["--head", f"--port={PORT}", "--include-dashboard=false"]
        if not is_head:
            where = [f"--address={self.address(self._names[0])}:{PORT}"]
        self._nodes[name] = subprocess.Popen(
            [
                *self.inside(name), str(RAY), "start", *where, "--block", "--disable-usage-stats",
                f"--node-ip-address={self.address(name)}", f"--num-cpus={cpus}", f"--resources={resources}",
                "--object-store-memory=150000000",
            ],
            env={**os.environ, **self.env}, start_new_session=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.until(
            lambda: any("raylet/raylet" in " ".join(p.cmdline()) for p in self.processes(name)), f"Ray on {name}"
        )

    def processes(self, name: str) -> list[psutil.Process]:
        """Those of a machine's Ray node."""
        with suppress(psutil.NoSuchProcess, KeyError):
            node = psutil.Process(self._nodes[name].pid)
            return [process for process in (node, *node.children(recursive=True)) if process.is_running()]
        return []

    def runs(self, name: str, actor: str) -> int:
        """Actors of a class on a machine."""
        count = 0
        for process in self.processes(name):
            with suppress(psutil.Error):
                count += process.cmdline()[0].startswith(f"ray::{actor}")
        return count

    def kill(self, name: str) -> None:
        """SIGKILL for everything of a machine at once."""
        node = self._nodes.pop(name)
        with suppress(psutil.NoSuchProcess):
            doomed = psutil.Process(node.pid).children(recursive=True)
            for sent in (signal.SIGSTOP, signal.SIGKILL):
                for process in doomed:
                    with suppress(psutil.NoSuchProcess):
                        process.send_signal(sent)
        with suppress(ProcessLookupError):
            node.kill()
        node.wait(timeout=20)

    def cut(self, name: str) -> None:
        """From now on every packet to and from a machine is lost; nobody is told."""
        self._ip("-n", self._id, "route", "add", "blackhole", self.address(name))
        self._forward(self._port(name), "0")

    def mend(self, name: str) -> None:
        """Let packets through again."""
        self._ip("-n", self._id, "route", "del", "blackhole", self.address(name))
        self._forward(self._port(name), "1")

    def until(self, condition: Callable[[], bool], what: str, timeout_s: float = DEADLINE_S) -> None:
        """Wait."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, what
            time.sleep(0.1)

    def _add(self, name: str) -> None:
        self._names.append(name)
        space = self._space(name)
        self._ip("netns", "add", space)
        port, router = self._port(name), self.address(name)[:-1] + "1"
        self._ip("link", "add", "eth0", "netns", space, "type", "veth", "peer", "name", port, "netns", self._id)
        for where, link, address in ((space, "eth0", self.address(name)), (self._id, port, router)):
            self._ip("-n", where, "addr", "add", f"{address}/24", "dev", link)
            self._ip("-n", where, "link", "set", link, "up")
        self._ip("-n", space, "link", "set", "lo", "up")
        self._ip("-n", space, "route", "add", "default", "via", router)

    def _forward(self, link: str, value: str) -> None:
        self._ip("netns", "exec", self._id, "sysctl", "-w", f"net/ipv4/conf/{link}/forwarding={value}")

    def _space(self, name: str) -> str:
        return f"{self._id}-{name}"

    def _port(self, name: str) -> str:
        return f"to-{name}"

    @staticmethod
    def _ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)
