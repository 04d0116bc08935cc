"""What does the front of agent programs cost, and who is harmed by those that misuse it?

256 sessions of one rollout actor with the simulated engine, each a conversation that asks as soon as it is answered.
The same requests go to the actor directly and through the gateway, in phases that alternate: a request's overhead is
the difference. The last phase goes through the gateway while 1,000 requests come that no client should send: slow,
oversized, malformed ones, and such with a foreign key. Memory is that of the gateway's process in each phase.

    uv run python bench/gateway.py [--sessions 256] [--phase-s 150] [--bad 1000]

Every turn is durable in a real store before it is answered, on both ways. Exits with 1 if a good request fails, a bad
one is not refused, or memory grows.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import socket
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any
from uuid import uuid4

import psutil
import ray

from pmdflow.agents.channel import Channels
from pmdflow.agents.desk import Incoming
from pmdflow.agents.keys import Credential
from pmdflow.agents.requests import parse_turn
from pmdflow.config.load import load
from pmdflow.config.schema import Config
from pmdflow.config.settle import settle
from pmdflow.data.prompts import make_prompts
from pmdflow.rollout.launching import AgentsPlace
from pmdflow.run.actors import start_rollout, start_store
from pmdflow.types import Quota

ROOT = Path(__file__).parents[1]
WORKER = "rollout-0/1"
TURNS, MAX_TOKENS, EPISODE = 8, 16, 1 << 16
MOST_GROWTH = 1.15
"""Of the gateway's memory, from a quarter of the time to the end."""


@dataclass(slots=True)
class Load:
    """What the sessions of one phase have seen."""

    seconds: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def row(self, name: str) -> str:
        middle, p99 = median(self.seconds) * 1e3, quantiles(self.seconds, n=100)[98] * 1e3
        return f"{name:<24}{len(self.seconds):>9}{middle:>11.1f}{p99:>11.1f}{len(self.failed):>9}"


class Connection:
    """A kept-alive HTTP connection that does as little as it can: what is measured is not the client."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, path: str, key: str, body: bytes) -> tuple[int, bytes]:
        """Status and body of the answer."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        return await read_answer(reader)

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Status and body."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    length = next((int(line.partition(":")[2]) for line in head.split("\r\n") if line.startswith("content-length")), 0)
    return int(head.split()[1]), await reader.readexactly(length)


class World:
    """A store, a rollout actor that holds a lease for each session, and a gateway where one is asked for."""

    def __init__(self, folder: Path, sessions: int) -> None:
        options = [
            "model.path=configs/tiny-arithmetic", f"run.dir={folder}", "run.name=bench", "rollout.engine=simulated",
            f"rollout.slots={sessions}", "rollout.actors=1", f"data.max_tokens={EPISODE}", "eval.prompts=0",
            "agents.command=[sleep, '100000']", f"agents.concurrency={sessions}", "agents.timeout_s=100000",
            "scheduler.tokens_per_iteration=1000000000", "rollout.lease_ttl_s=300",
            "learner.tokens_per_microbatch=200000",
        ]  # fmt: skip
        self.config: Config = settle(load(ROOT / "configs" / "quickstart.yaml", options).config, gpus=None)
        self.run, self.sessions, self.secret = folder / "bench", sessions, secrets.token_bytes(32)
        self.run.mkdir()
        self.store: Any = start_store(self.config, self.run)
        prompt = make_prompts(self.config).prompt(0)
        ray.get(self.store.publish.remote(0, None, {}))
        ray.get(self.store.set_quota.remote(Quota(version=0, groups=9, tokens=1 << 40, tokens_per_segment=None)))
        ray.get(self.store.admit.remote([("r", 0, prompt)], "train", sessions, EPISODE))
        self.text, self.gateway, self.port = prompt.text, None, 0
        place = AgentsPlace(address="http://127.0.0.1:1", secret=self.secret)
        self.actor: Any = start_rollout(self.config, self.run, self.store, {}, index=0, worker=WORKER, agents=place)
        self.running = self.actor.run.remote(None)

    def trajectories(self) -> list[int]:
        """Those whose programs are there."""
        deadline, folder = time.monotonic() + 300, self.run / "agents"
        while not folder.exists() or len(list(folder.iterdir())) < self.sessions:
            assert time.monotonic() < deadline, "the programs did not start within 300 s"
            ray.wait([self.running], timeout=0.2)
        return sorted(int(path.name.partition("-")[0]) for path in folder.iterdir())

    def open_gateway(self) -> int:
        """Start another one, which takes the place of that before; returns its process."""
        from pmdflow.agents.gateway import Gateway

        self.close_gateway()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        made: Any = ray.remote(num_cpus=0, max_concurrency=4)(Gateway)
        self.gateway = made.remote(config=self.config.agents, model="bench", secret=self.secret, port=self.port)
        self.gateway.run.remote()
        deadline = time.monotonic() + 60
        while socket.socket().connect_ex(("127.0.0.1", self.port)):
            assert time.monotonic() < deadline, "the gateway did not start within 60 s"
            time.sleep(0.05)
        return int(ray.get(self.gateway.__ray_call__.remote(lambda _: os.getpid())))

    def close_gateway(self) -> None:
        if self.gateway is not None:
            ray.get(self.gateway.stop.remote())
            ray.kill(self.gateway)


def conversation(text: str, said: list[str]) -> bytes:
    return json.dumps(
        {"prompt": text + "".join(f"{answer}\nmore\n" for answer in said), "max_tokens": MAX_TOKENS}
    ).encode()


async def direct(world: World, trajectories: list[int], seconds: float) -> Load:
    """Ask the rollout actor itself."""
    load, channels, until = Load(), Channels(name := uuid4().hex), time.monotonic() + seconds

    async def session(trajectory: int) -> None:
        number, said = 0, list[str]()
        while time.monotonic() < until:
            number += 1
            turn = parse_turn(json.loads(conversation(world.text, said)), chat=False, attempt=0)
            begun = time.perf_counter()
            incoming = Incoming(id=f"{name}-{trajectory}-{number}", trajectory=trajectory, epoch=1, content=turn)
            answer = await channels.ask(WORKER, incoming)
            take(load, said, begun, answer.status, answer.body)

    await asyncio.gather(*map(session, trajectories))
    return load


async def through_gateway(world: World, trajectories: list[int], seconds: float) -> Load:
    """Ask the front."""
    load, until = Load(), time.monotonic() + seconds

    async def session(trajectory: int) -> None:
        key, said, connection = Credential(WORKER, trajectory, 1).key(world.secret), list[str](), Connection(world.port)
        while time.monotonic() < until:
            body = conversation(world.text, said)
            begun = time.perf_counter()
            status, answer = await connection.post(f"/episodes/{trajectory}/v1/completions", key, body)
            take(load, said, begun, status, json.loads(answer))
        connection.close()

    await asyncio.gather(*map(session, trajectories))
    return load


def take(load: Load, said: list[str], begun: float, status: int, body: Any) -> None:
    load.seconds.append(time.perf_counter() - begun)
    if status != 200:
        load.failed.append(str(body)[:200])
        said.clear()
        return
    said.append(body["choices"][0]["text"])
    if len(said) == TURNS:
        said.clear()  # the same first request again: another sample, in a branch


async def misuse(world: World, trajectory: int, count: int) -> Counter[str]:
    """Requests that no client should send, 64 at a time; how each is answered."""
    key, path = Credential(WORKER, trajectory, 1).key(world.secret), f"/episodes/{trajectory}/v1/completions"
    foreign, told, room = Credential(WORKER, trajectory + 1, 1).key(world.secret), Counter[str](), asyncio.Semaphore(64)
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n"
    kinds = {
        "slow head": head.encode(),
        "slow body": f"{head}content-length: 100\r\n\r\n{{".encode(),
        "says nothing": b"",
        "oversized": f"{head}content-length: {1 << 30}\r\n\r\n".encode(),
        "no JSON": f'{head}content-length: 9\r\n\r\n{{"prompt"'.encode(),
        "no request": f"{head}content-length: 2\r\n\r\n{{}}".encode(),
        "no HTTP": b"GARBAGE\r\n\r\n",
        "a huge header": f"{head}x: {'y' * 100_000}\r\n\r\n".encode(),
        "foreign key": f"{head.replace(key, foreign)}content-length: 2\r\n\r\n{{}}".encode(),
        "no key": f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{{}}".encode(),
    }

    async def one(kind: str) -> None:
        async with room:
            reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
            writer.write(kinds[kind])
            try:
                async with asyncio.timeout(120):
                    status, _ = await read_answer(reader)
                told[f"{kind}: {status}"] += 1
            except asyncio.IncompleteReadError:
                told[f"{kind}: closed"] += 1
            except ConnectionError:
                told[f"{kind}: closed"] += 1
            except TimeoutError:
                told[f"{kind}: NOT ANSWERED"] += 1
            writer.close()

    await asyncio.gather(*(one(list(kinds)[nth % len(kinds)]) for nth in range(count)))
    return told


async def watch(pid: int, sizes: list[float]) -> None:
    while True:
        sizes.append(psutil.Process(pid).memory_info().rss / 2**20)
        await asyncio.sleep(1.0)


async def measure(world: World, seconds: float, bad: int) -> bool:
    """All phases; whether everything is as it should be."""
    trajectories, fine = world.trajectories(), True
    print(f"{'way':<24}{'requests':>9}{'median ms':>11}{'p99 ms':>11}{'failed':>9}")
    seen: dict[str, Load] = {}
    for name in ("direct 1", "gateway 1", "direct 2", "gateway 2", "gateway, misused"):
        if name.startswith("direct"):
            seen[name] = await direct(world, trajectories, seconds)
        else:
            pid, sizes = world.open_gateway(), list[float]()
            watching = asyncio.create_task(watch(pid, sizes))
            misused = name.endswith("misused")
            attack = asyncio.create_task(misuse(world, trajectories[0], bad)) if misused else None
            seen[name] = await through_gateway(world, trajectories, seconds)
            if attack is not None:
                told = await attack
                print("misuse:", ", ".join(f"{kind} x{count}" for kind, count in sorted(told.items())))
                fine &= not any("NOT" in kind or kind.endswith(": 200") for kind in told)
            watching.cancel()
            quarter, last = sizes[len(sizes) // 4], max(sizes[-3:])
            fine &= last <= quarter * MOST_GROWTH
            memory = psutil.Process(ray.get(world.actor.__ray_call__.remote(lambda _: os.getpid()))).memory_info().rss
            print(f"  gateway {sizes[0]:.0f} -> {quarter:.0f} -> {last:.0f} MiB, rollout actor {memory >> 20} MiB")
        print(seen[name].row(name))
        fine &= not seen[name].failed
        if seen[name].failed:
            print("  failed:", seen[name].failed[0])
    plain, front = (seen[f"{way} 1"].seconds + seen[f"{way} 2"].seconds for way in ("direct", "gateway"))
    over = median(front) - median(plain), quantiles(front, n=100)[98] - quantiles(plain, n=100)[98]
    print(f"overhead of a request: median {over[0] * 1e3:.1f} ms, p99 {over[1] * 1e3:.1f} ms")
    return fine


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=256)
    parser.add_argument("--phase-s", type=float, default=150.0)
    parser.add_argument("--bad", type=int, default=1000)
    given = parser.parse_args()
    os.chdir(ROOT)
    ray.init(address="local", log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder), given.sessions)
        try:
            return 0 if asyncio.run(measure(world, given.phase_s, given.bad)) else 1
        finally:
            world.close_gateway()
            ray.get(world.actor.stop.remote())
            ray.wait([world.running], timeout=60)
            ray.shutdown()


if __name__ == "__main__":
    sys.exit(main())
