"""What does a publication cost: memory of the node, pauses of rollout, and bytes between nodes?

    nice python bench/publication.py --mib 2048 --engines 4 --rounds 5 --json bench/results/publication.json
    nice python bench/publication.py --mib 64 --rounds 2                       # a small form
    nice python bench/publication.py --learn                                   # what of a bf16 model changes at lr 1e-6

A publisher (bfloat16 weights, of which a hundredth changes from version to version) and engines, each a Ray actor with
the transport that a learner rank and a rollout actor have. In `object_store` all are on one node and map one file; in
`far` and `delta` the engines are on another one, which gets the file, or what changed, through Ray; `filesystem` goes
by a directory. The modes take turns within each round. Reported are, as medians over rounds:

- publish_s: the learner is blocked. fetch_s: until an engine has the file, beside its generation; the slowest engine.
- load_s: rollout is paused, copying the file into the engine's own weights; the slowest engine.
- peak: memory of the node beyond what publisher and engines held before, over the size of the weights: anonymous memory
  of all processes, files in memory (each once) and Ray's object store.
- stall_ms: the longest that a thread which ticks every millisecond was held up, in any engine or the publisher.
- wire: bytes that came from elsewhere, for all engines, over the size of the weights.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import torch

from pmdflow.config.schema import Config
from pmdflow.weights.file import NamedTensors, WeightsFile
from pmdflow.weights.filesystem import FilesystemTransport
from pmdflow.weights.held import NodeNotes
from pmdflow.weights.object_store import ObjectStoreTransport
from pmdflow.weights.transport import WeightsHandle

MODES = ("object_store", "far", "delta", "filesystem")
TENSOR_MIB = 16
CHANGED = 0.01
TIMEOUT_S = 600.0


class Process:
    """A learner's rank or a rollout actor: a transport, and weights of its own."""

    def __init__(self, mode: str, directory: str, node: str, mib: int) -> None:
        torch.set_num_threads(1)
        names = [f"layers.{index:04d}.weight" for index in range(max(mib // TENSOR_MIB, 1))]
        numel = (min(mib, TENSOR_MIB) << 20) // 2
        self._weights = {name: torch.full((numel,), 0.02, dtype=torch.bfloat16) for name in names}
        self._transport: Any
        if mode == "filesystem":
            self._transport = FilesystemTransport(Path(directory) / "weights")
        else:
            self._transport = ObjectStoreTransport(directory, delta=mode == "delta")
            self._transport._notes = NodeNotes(directory, node)

    def pid(self) -> int:
        return os.getpid()

    def publish(self, version: int) -> tuple[WeightsHandle, dict[str, float]]:
        step = round(1 / CHANGED)
        for tensor in self._weights.values():
            tensor.view(torch.int16)[version % step :: step] ^= 1
        with _ticking() as stalled:
            began = time.perf_counter()
            handle = self._transport.publish(version, NamedTensors.of(self._weights))
            seconds = time.perf_counter() - began
        return handle, {"publish_s": seconds, "stall_ms": stalled()}

    def take(self, handle: WeightsHandle) -> dict[str, float]:
        before = self._transport.received["fetched_bytes"]
        with _ticking() as stalled:
            began = time.perf_counter()
            file: WeightsFile = self._transport.fetch(handle, timeout_s=TIMEOUT_S)
            fetched = time.perf_counter()
            for name, own in self._weights.items():
                own.copy_(file[name])
            loaded = time.perf_counter()
        wire = self._transport.received["fetched_bytes"] - before
        return {"fetch_s": fetched - began, "load_s": loaded - fetched, "stall_ms": stalled(), "wire": float(wire)}

    def digest(self) -> str:
        return WeightsFile.write(NamedTensors.of(self._weights)).digest

    def read_weights(self, version: int, offset: int, num_bytes: int, delta: bool) -> Any:
        return self._transport.read(version, offset, num_bytes, delta=delta)


@contextmanager
def _ticking() -> Iterator[Any]:
    """Tick meanwhile; what is given answers by the longest wait beyond a tick, in milliseconds."""
    done, most = threading.Event(), [0.0]

    def tick() -> None:
        last = time.perf_counter()
        while not done.is_set():
            time.sleep(0.001)
            now = time.perf_counter()
            most[0], last = max(most[0], now - last - 0.001), now

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    yield lambda: 1000 * most[0]
    done.set()
    thread.join()


class Node:
    """Memory of the node's processes, watched."""

    def __init__(self, pids: list[int]) -> None:
        self._pids = pids
        self._before, self._most, self._done = self._held(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def grown(self) -> int:
        """Bytes by which it grew at most since this was made; watches no more."""
        self._done.set()
        self._thread.join()
        return max(self._most, self._held()) - self._before

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self._most = max(self._most, self._held())

    def _held(self) -> int:
        anonymous, files = 0, {}
        for pid in self._pids:
            status = Path(f"/proc/{pid}/status").read_text()
            anonymous += next(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                try:
                    if os.readlink(descriptor).startswith("/memfd:pmdflow"):
                        stat = descriptor.stat()
                        files[stat.st_ino] = 512 * stat.st_blocks
                except OSError:  # closed meanwhile
                    continue
        total = ray.cluster_resources().get("object_store_memory", 0)
        plasma = total - ray.available_resources().get("object_store_memory", total)
        return anonymous + sum(files.values()) + int(plasma)


def measure(mode: str, args: argparse.Namespace, directory: str) -> Iterator[dict[str, float]]:
    """One round after the other, as it is asked for."""
    make = ray.remote(num_cpus=0, max_concurrency=4)(Process).remote
    far = mode in ("far", "delta")
    publisher = make(mode, directory, "a", args.mib)
    engines = [make(mode, directory, "b" if far else "a", args.mib) for _ in range(args.engines)]
    everyone = [publisher, *engines]
    pids = ray.get([one.pid.remote() for one in everyone], timeout=TIMEOUT_S)
    size = args.mib << 20
    for version in range(1, args.rounds + 2):
        node = Node(pids)
        handle, row = ray.get(publisher.publish.remote(version), timeout=TIMEOUT_S)
        taken = ray.get([engine.take.remote(handle) for engine in engines], timeout=TIMEOUT_S)
        row |= {key: max(one[key] for one in taken) for key in ("fetch_s", "load_s")}
        row["stall_ms"] = max(row["stall_ms"], *(one["stall_ms"] for one in taken))
        row |= {"wire": sum(one["wire"] for one in taken) / size, "peak": node.grown() / size}
        digests = set(ray.get([one.digest.remote() for one in everyone], timeout=TIMEOUT_S))
        if digests != {handle.digest}:
            raise SystemExit(f"{mode}: version {version} is {handle.digest}, engines have {digests}")
        if version > 1:  # the first has no version before it
            yield row
    for one in everyone:
        ray.kill(one)


def publications(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The medians of each mode."""
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    rows: dict[str, list[dict[str, float]]] = {mode: [] for mode in args.modes}
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        rounds = {mode: measure(mode, args, f"{directory}/{mode}") for mode in args.modes}
        for _ in range(args.rounds):
            for mode, ask in rounds.items():
                rows[mode].append(next(ask))
        for ask in rounds.values():
            next(ask, None)
    ray.shutdown()
    return {mode: {key: statistics.median(row[key] for row in own) for key in own[0]} for mode, own in rows.items()}


def learn(args: argparse.Namespace) -> list[float]:
    """The length of each version's delta over that of its file, of a bfloat16 model of 20M trained at `--lr`."""
    from learner import DATA, SIZES, make_batch, make_config  # of this folder
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from pmdflow.learner.learner import Learner

    settings = argparse.Namespace(
        **DATA["20m"] | {"dtype": "bfloat16", "longest": 128, "sequences": 16},
        threads=2,
        compile=False,
        activation_checkpointing=False,
    )
    shares, before = [], None
    with tempfile.TemporaryDirectory() as directory:
        torch.manual_seed(0)
        Qwen3ForCausalLM(Qwen3Config(**SIZES["20m"])).save_pretrained(directory)
        for version in range(args.rounds + 1):
            settings.seed = version
            batch = make_batch(settings, SIZES["20m"]["vocab_size"])
            if version == 0:
                config = make_config(settings, directory, batch)
                steps = {"lr": args.lr, "steps_per_iteration": 4, "tau": 0.1}
                learner = Learner(config=Config.model_validate(_with(config, steps)), rank=0)
                learner.setup(learner.address())
            else:
                learner.train(batch)
            base = before
            before = learner.publish(lambda tensors, base=base: WeightsFile.write(tensors, base))
            assert before is not None, "there is one rank"
            if base is not None:
                size = os.fstat(before.descriptor).st_size
                shares.append(1.0 if before.delta is None else before.delta.num_bytes / size)
        learner.close()
    return shares


def _with(config: Config, learner: dict[str, Any]) -> dict[str, Any]:
    values = config.model_dump(exclude_unset=True)
    return {**values, "learner": {**values["learner"], **learner}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=2048, help="weights in bfloat16")
    parser.add_argument("--engines", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--directory", help="where `filesystem` writes; default: the temporary one")
    parser.add_argument("--learn", action="store_true", help="measure deltas of a model that is trained instead")
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = {"learn": learn(args), "lr": args.lr} if args.learn else publications(args)
    print(json.dumps(found, indent=1))
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
