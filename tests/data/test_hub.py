"""The real client of the Hub against one on loopback: by id, pinned, offline afterwards, cut and gone on, refused."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from tests.support.data import make_config
from tests.support.hub import Hub
from tests.support.paths import ROOT, TINY

RESOLVE = """
import json, sys
from pathlib import Path
from pmdflow.config.schema import Config
from pmdflow.data.hub import fetch_dataset
from pmdflow.data.inputs import resolve_inputs
from pmdflow.data.table import open_rows
config = Config.model_validate_json(sys.argv[1])
rows = []
try:
    inputs = resolve_inputs(config, merged=Path("never"), pins=json.loads(sys.argv[2]))
    data = inputs.config.data
    if data.task.startswith("hf:"):
        rows = list(open_rows(fetch_dataset(data.task.removeprefix("hf:"), config=data.config, split=data.split)))
except ValueError as error:
    sys.exit(f"refused: {error}")
print(json.dumps({
    "path": inputs.config.model.path, "task": data.task, "model": inputs.model, "pins": inputs.pins, "rows": rows,
}))
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub(tmp_path / "home") as served:
        yield served


def resolve(
    hub: Hub, model: str, task: Any = "reasoning_gym/gcd", *, pins: Any = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Resolve a configuration in a process of its own, as the client reads its environment when it is imported."""
    environment = {**os.environ, **hub.environment, **options.pop("environment", {})}
    config = make_config(model, task, **options).model_dump_json(exclude={"data": {"max_prompt_tokens"}})
    return subprocess.run(
        [sys.executable, "-c", RESOLVE, config, json.dumps(pins or {})],
        capture_output=True, text=True, timeout=90, check=False, cwd=ROOT, env=environment,
    )  # fmt: skip


def resolved(hub: Hub, *arguments: Any, **options: Any) -> dict[str, Any]:
    done = resolve(hub, *arguments, **options)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_model_by_id_is_pinned_whole_and_found_again_offline(hub: Hub) -> None:
    files = {path.name: path.read_bytes() for path in TINY.iterdir()}
    copies = {"original/consolidated.00.pth": b"x", "consolidated.safetensors": b"x", "pytorch_model.bin": b"x"}
    commit = hub.push("org/tiny", {**files, **copies, "model.gguf": b"x", "README.md": b"x"})
    found = resolved(hub, "org/tiny")
    folder = Path(found["path"])
    assert found["model"] == {"id": "org/tiny", "commit": commit}
    assert found["pins"] == {"org/tiny": commit}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    order = [request.path.rpartition("/")[2] for request in hub.requests if request.method == "GET"]
    assert order.index("config.json") < order.index("model.safetensors")

    newer = hub.push("org/tiny", {**files, "generation_config.json": b"{}"})
    assert resolved(hub, "org/tiny")["model"]["commit"] == newer
    asked = len(hub.requests)
    for text, pins in ((f"org/tiny@{commit}", {}), ("org/tiny", {"org/tiny": commit})):
        assert resolved(hub, text, pins=pins)["path"] == str(folder)
    assert [request for request in hub.requests[asked:] if "org/tiny" in request.path] == []  # a commit is asked once

    hub.stop()
    assert resolved(hub, "org/tiny")["model"]["commit"] == newer  # what the cache knows of main
    offline = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    assert resolved(hub, f"org/tiny@{commit}", environment=offline)["path"] == str(folder)


def test_a_cut_download_goes_on_within_a_file_and_after_a_kill_file_by_file(hub: Hub) -> None:
    files = {path.name: path.read_bytes() for path in TINY.iterdir()}
    data = bytearray(files["model.safetensors"])
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    padding = random.Random(0).randbytes(24 << 20)
    end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    header["model.padding"] = {"dtype": "U8", "shape": [len(padding)], "data_offsets": [end, end + len(padding)]}
    text = json.dumps(header).encode()
    start = 8 + int.from_bytes(data[:8], "little")
    files["model.safetensors"] = len(text).to_bytes(8, "little") + text + bytes(data[start:]) + padding
    hub.push("org/large", files)
    hub.cut_after["model.safetensors"] = [15 << 20, 11 << 20]
    found = resolved(hub, "org/large")
    assert (Path(found["path"]) / "model.safetensors").read_bytes() == files["model.safetensors"]
    ranges = [request.range for request in hub.asked("model.safetensors") if request.method == "GET"]
    assert ranges == [None, f"bytes={10 << 20}-", f"bytes={20 << 20}-"]  # the client writes 10 MiB at a time

    hub.push("org/killed", files)
    hub.hold["model.safetensors"] = 12 << 20
    config = make_config("org/killed", "reasoning_gym/gcd").model_dump_json(exclude={"data": {"max_prompt_tokens"}})
    command = [sys.executable, "-c", RESOLVE, config, "{}"]
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, **hub.environment}) as process:
        assert hub.held.wait(timeout=60)
        process.kill()
    del hub.hold["model.safetensors"]
    before = len(hub.requests)
    found = resolved(hub, "org/killed")
    assert (Path(found["path"]) / "model.safetensors").read_bytes() == files["model.safetensors"]
    again = {request.path.rpartition("/")[2] for request in hub.requests[before:] if request.method == "GET"}
    assert again & set(files) == {"model.safetensors"}


@pytest.mark.parametrize("how", ["parquet", "jsonl"])
def test_a_data_set_by_id_split_and_configuration(hub: Hub, tmp_path: Path, how: str) -> None:
    def file(split: str) -> bytes:
        rows = [{"question": f"{split} {i}?", "answer": str(i)} for i in range(6)]
        if how == "jsonl":
            return "".join(json.dumps(row) + "\n" for row in rows).encode()
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "file")
        return (tmp_path / "file").read_bytes()

    names = {
        f"{config}/{split}-00000-of-00001.{how}": (config, split) for config in "ab" for split in ("train", "test")
    }
    commit = hub.push("org/sums", {name: file(" ".join(of)) for name, of in names.items()}, kind="datasets")
    hub.push("org/tiny", TINY)
    found = resolved(hub, "org/tiny", "hf:org/sums", config="b")
    assert found["task"] == f"hf:org/sums@{commit}"
    assert found["pins"]["hf:org/sums"] == commit
    assert found["rows"] == [{"question": f"b train {i}?", "answer": str(i)} for i in range(6)]
    fetched = {request.path.partition(commit)[2][1:] for request in hub.asked(f"/resolve/{commit}/")}
    assert fetched == {f"b/train-00000-of-00001.{how}"}
    hub.stop()
    offline = {"HF_HUB_OFFLINE": "1"}
    assert resolved(hub, "org/tiny", "hf:org/sums", config="b", environment=offline) == found
    done = resolve(hub, "org/tiny", "hf:org/sums", config="a", environment=offline)
    assert "data.task is 'org/sums@" in done.stderr
    assert "HF_HUB_OFFLINE is set" in done.stderr


@pytest.mark.parametrize(
    ("model", "task", "message"),
    [
        ("org/none", "reasoning_gym/gcd", "model.path is 'org/none': there is no such folder, and the Hub at http"),
        ("org/tiny@v9", "reasoning_gym/gcd", "model.path is 'org/tiny@v9': the model has no such revision; name"),
        ("org/gated", "reasoning_gym/gcd", "a gated model: ask for access on its page at http"),
        ("no folder", "reasoning_gym/gcd", "model.path is 'no folder': there is no such folder, and it is no Hub id"),
        ("org/tiny", "hf:org/none", "data.task is 'org/none': the Hub at http"),
        ("org/tiny", "hf:org/sums@v9", "data.task is 'org/sums@v9': the data set has no such revision"),
        ("org/tiny", "hf:org/sums", "there is no split 'train' among test.jsonl; set data.split"),
        ("org/small", "reasoning_gym/gcd", "it has 8 positions, but"),
    ],
)
def test_what_cannot_be_had_is_one_clear_line(hub: Hub, model: str, task: str, message: str) -> None:
    files = {path.name: path.read_bytes() for path in TINY.iterdir()}
    small = json.dumps({**json.loads(files["config.json"]), "max_position_embeddings": 8}).encode()
    hub.push("org/tiny", files)
    hub.push("org/gated", files, gated=True)
    hub.push("org/small", {**files, "config.json": small})
    hub.push("org/sums", {"test.jsonl": b'{"prompt": "?"}\n'}, kind="datasets")
    done = resolve(hub, model, task)
    lines = [line for line in done.stderr.splitlines() if line.startswith("refused: ")]
    assert done.returncode == 1
    assert message in lines[0]
    assert done.stderr.rstrip().endswith(lines[0])  # no traceback, nothing after it
    if model == "org/small":
        assert hub.asked("model.safetensors") == []  # weights of a model that cannot be trained are not downloaded


def test_no_network_is_one_clear_line_and_a_token_is_sent(hub: Hub) -> None:
    hub.push("org/tiny", TINY)
    resolved(hub, "org/tiny", environment={"HF_TOKEN": "hf_secret"})
    assert {request.token for request in hub.asked("org/tiny")} == {"hf_secret"}
    hub.stop()
    done = resolve(hub, "org/other")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("refused: ")]
    assert "model.path is 'org/other': there is no such folder, and the model is not whole in " in line
    assert "cannot be asked (" in line
    assert "mend the network" in line
