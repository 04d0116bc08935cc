"""A million rows are held as an index and as Arrow, not as Python objects."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from tests.support.paths import ROOT, TINY

MEASURE = """
import sys
from pathlib import Path
import psutil
from pmdflow.data.table import TablePrompts, open_rows
from pmdflow.data.tokenizer import make_tokenize
import pyarrow.parquet, msgpack
process = psutil.Process()
tokenize = make_tokenize(sys.argv[1], max_tokens=4096)
before = process.memory_info().rss
rows = open_rows([Path(sys.argv[2])])
prompts = TablePrompts(rows=rows, name="large", tokenize=tokenize, num_held_out=100)
ids = {prompts.prompt(cursor * 997).id for cursor in range(1000)}
assert len(ids) == 1000
print(len(rows), process.memory_info().rss - before)
"""
ROWS, BATCH = 1_000_000, 50_000
INDEX_BYTES = 64
"""Of each row, while it is made: offset 8, line 4, key 8, tokens 4, row 4, order 4, twice what is sorted out."""
SLACK_BYTES = 64 << 20
"""Batches in flight and what the allocators keep."""


def batch(start: int) -> list[dict[str, str]]:
    return [
        {"prompt": f"problem {i}: " + "how much is it? " * 12, "answer": f"{i * i}", "kind": "sum"}
        for i in range(start, start + BATCH)
    ]


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_million_rows_take_little_memory(tmp_path: Path, suffix: str) -> None:
    path, held = tmp_path / f"large.{suffix}", 0
    if suffix == "jsonl":
        with open(path, "w", encoding="utf-8") as file:
            for start in range(0, ROWS, BATCH):
                file.writelines(json.dumps(row) + "\n" for row in batch(start))
    else:
        schema = pyarrow.schema([(name, pyarrow.string()) for name in ("prompt", "answer", "kind")])
        with parquet.ParquetWriter(path, schema) as writer:
            for start in range(0, ROWS, BATCH):
                table = pyarrow.Table.from_pylist(batch(start), schema)
                held += table.nbytes
                writer.write_table(table)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(TINY), str(path)],
        capture_output=True, text=True, timeout=800, check=True, cwd=ROOT,
    )  # fmt: skip
    rows, grown = map(int, done.stdout.split())
    print(f"\n{rows:,} rows of {suffix}: {grown / 2**20:.0f} MiB resident, {held / 2**20:.0f} MiB of it in Arrow")
    assert rows == ROWS
    assert grown < 1.25 * held + ROWS * INDEX_BYTES + SLACK_BYTES
