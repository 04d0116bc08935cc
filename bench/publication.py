"""What does a publication cost: memory of the node, pauses of rollout, and bytes between nodes?

    nice python bench/publication.py --mib 2048 --engines 4 --rounds 5 --json bench/results/publication.json
    nice python bench/publication.py --mib 64 --rounds 2                       # a small form
    nice python bench/publication.py --learn                                   # what of a bf16 model changes at lr 1e-6

A publisher (bfloat16 weights, of which a hundredth changes from version to version) and engines, each a Ray actor with
the transport that a learner rank and a rollout actor have. In `object_store` all are on one node and map one file; in
`far`, `ranks` and `delta` the engines are on another one, which gets the file, or what changed, through Ray: in `ranks`
from two ranks on two nodes, which write half of it each. `filesystem` goes by a directory, and `before` is the
transport of commit 1fa6726. The modes take turns within each round. Reported are median, least and most of the rounds:

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
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist

from pmdflow.config.schema import Config
from pmdflow.learner.fsdp import all_ranks, free_address
from pmdflow.weights.blocks import BlockWriter
from pmdflow.weights.file import Layout, NamedTensors, WeightsFile
from pmdflow.weights.filesystem import FilesystemTransport
from pmdflow.weights.held import NodeNotes
from pmdflow.weights.object_store import ObjectStoreTransport
from pmdflow.weights.shares import ALONE, Ranks, write_shares
from pmdflow.weights.transport import WeightsHandle

MODES = ("object_store", "far", "ranks", "delta", "filesystem", "before")
NUM_RANKS = 2
TENSOR_MIB = 16
CHANGED = 0.01
TIMEOUT_S = 600.0


class Before:
    """What 1fa6726 did: all tensors copied to the host, put as one object, and copied by each engine."""

    def __init__(self) -> None:
        self.received: Counter[str] = Counter()

    def publish(self, version: int, weights: NamedTensors, _: Ranks) -> WeightsHandle:
        whole = [tensor.clone() for tensor in weights.values]
        arrays = {name: tensor.view(torch.int16).numpy() for name, tensor in zip(weights.specs, whole, strict=True)}
        return WeightsHandle(version=version, location=[ray.put(arrays)])

    def fetch(self, handle: WeightsHandle, *, timeout_s: float) -> dict[str, torch.Tensor]:
        arrays = ray.get(handle.location[0], timeout=timeout_s)
        return {name: torch.tensor(array).view(torch.bfloat16) for name, array in arrays.items()}


class Process:
    """A learner's rank or a rollout actor: weights of its own, and a transport as long as a turn lasts."""

    def __init__(self, mib: int) -> None:
        torch.set_num_threads(1)
        names = [f"layers.{index:04d}.weight" for index in range(max(mib // TENSOR_MIB, 1))]
        numel = (min(mib, TENSOR_MIB) << 20) // 2
        self._weights = {name: torch.full((numel,), 0.02, dtype=torch.bfloat16) for name in names}
        self._transport: Any = None
        self._ranks = ALONE
        self._steps = 0

    def begin(self, mode: str, directory: str, node: str, master: str | None, rank: int) -> None:
        if mode == "filesystem":
            self._transport = FilesystemTransport(Path(directory) / "weights")
        elif mode == "before":
            self._transport = Before()
        else:
            self._transport = ObjectStoreTransport(directory, delta=mode == "delta")
            self._transport._notes = NodeNotes(directory, node)
        self._ranks = ALONE
        if master is not None:
            if not dist.is_initialized():
                dist.init_process_group("gloo", init_method=f"tcp://{master}", rank=rank, world_size=NUM_RANKS)
            self._ranks = all_ranks(rank)

    def end(self) -> None:
        self._transport = None

    def pid(self) -> int:
        return os.getpid()

    def address(self) -> str:
        return free_address("127.0.0.1")

    def step(self) -> None:
        """What every publisher does before each publication, also one that has no part in it."""
        self._steps += 1
        apart = round(1 / CHANGED)
        for tensor in self._weights.values():
            tensor.view(torch.int16)[self._steps % apart :: apart] ^= 1

    def publish(self, version: int) -> tuple[WeightsHandle, dict[str, float]]:
        with _ticking() as stalled:
            began = time.perf_counter()
            handle = self._transport.publish(version, NamedTensors.of(self._weights), self._ranks)
            seconds = time.perf_counter() - began
        return handle, {"publish_s": seconds, "stall_ms": stalled()}

    def take(self, handle: WeightsHandle) -> dict[str, float]:
        before = self._transport.received["fetched_bytes"]
        with _ticking() as stalled:
            began = time.perf_counter()
            file = self._transport.fetch(handle, timeout_s=TIMEOUT_S)
            if isinstance(file, WeightsFile):
                file.populate()  # as an engine's `stage` does
            fetched = time.perf_counter()
            for name, own in self._weights.items():
                own.copy_(file[name])
            loaded = time.perf_counter()
        wire = self._transport.received["fetched_bytes"] - before
        return {"fetch_s": fetched - began, "load_s": loaded - fetched, "stall_ms": stalled(), "wire": float(wire)}

    def digest(self) -> str:
        layout = Layout(NamedTensors.of(self._weights))
        with open(os.devnull, "wb") as nowhere:
            return layout.write(BlockWriter(nowhere.fileno()), 0, layout.num_bytes).hex()

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


def measure(mode: str, publishers: list[Any], engines: list[Any], size: int, directory: str) -> dict[str, float]:
    """One turn."""
    far = mode in ("far", "ranks", "delta")
    trained, publishers = publishers, publishers if mode == "ranks" else publishers[:1]
    everyone = [*publishers, *engines]
    master = _all([publishers[0].address.remote()])[0] if mode == "ranks" else None
    _all([one.begin.remote(mode, directory, f"p{rank}", master, rank) for rank, one in enumerate(publishers)])
    _all([one.begin.remote(mode, directory, "e" if far else "p0", None, 0) for one in engines])
    pids = _all([one.pid.remote() for one in everyone])
    for version in (1, 2) if mode == "delta" else (2,):
        _all([one.step.remote() for one in trained])
        node = Node(pids)
        published = _all([one.publish.remote(version) for one in publishers])
        handle = published[0][0]
        row = {key: max(rank[key] for _, rank in published) for key in ("publish_s", "stall_ms")}
        taken = _all([engine.take.remote(handle) for engine in engines])
        row |= {key: max(one[key] for one in taken) for key in ("fetch_s", "load_s")}
        row["stall_ms"] = max(row["stall_ms"], *(one["stall_ms"] for one in taken))
        row |= {"wire": sum(one["wire"] for one in taken) / size, "peak": node.grown() / size}
    digests = set(_all([one.digest.remote() for one in everyone]))
    if len(digests) != 1 or handle.digest not in ("", *digests):
        raise SystemExit(f"{mode}: published is {handle.digest}, engines have {digests}")
    del handle, published
    _all([one.end.remote() for one in everyone])
    return row


def _all(refs: list[Any]) -> list[Any]:
    found: list[Any] = ray.get(refs, timeout=TIMEOUT_S)
    return found


def publications(args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Median, least and most of each mode."""
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    make = ray.remote(num_cpus=0, max_concurrency=4)(Process).remote
    counts = (NUM_RANKS if "ranks" in args.modes else 1, args.engines)
    publishers, engines = ([make(args.mib) for _ in range(count)] for count in counts)
    rows: dict[str, list[dict[str, float]]] = {mode: [] for mode in args.modes}
    for _ in range(args.rounds):
        for mode in args.modes:
            with tempfile.TemporaryDirectory(dir=args.directory) as directory:
                rows[mode].append(measure(mode, publishers, engines, args.mib << 20, directory))
    ray.shutdown()
    return {
        mode: {key: [round(of(row[key] for row in own), 4) for of in (statistics.median, min, max)] for key in own[0]}
        for mode, own in rows.items()
    }


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
            before = learner.publish(
                lambda tensors, ranks, base=base: write_shares(tensors, ranks, node="a", holder=None, base=base)[0]
            )
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
