"""The archive: round trip, crash leftovers, and that plain zarr and xarray read it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from pmdflow.errors import PmdflowError
from pmdflow.store import archive
from pmdflow.store.archive.writing import CHUNK_ROWS
from pmdflow.store.plan import in_claim_order
from pmdflow.types import ClaimPlan, TrainBatch
from tests.support.fixture_run import make_batch


def assert_equal(left: TrainBatch, right: TrainBatch) -> None:
    for field in dataclasses.fields(TrainBatch):
        one, other = getattr(left, field.name), getattr(right, field.name)
        if field.name == "components":
            assert list(one) == list(other)
            pairs = list(zip(one.values(), other.values(), strict=True))
        elif isinstance(one, np.ndarray):
            pairs = [(one, other)]
        else:
            assert one == other and type(one) is type(other), field.name
            continue
        for a, b in pairs:
            assert a.dtype == b.dtype and a.shape == b.shape, field.name
            assert a.tobytes() == b.tobytes(), field.name


def test_round_trip_is_bit_for_bit(tmp_path: Path) -> None:
    batch = make_batch(12)
    batch.logprobs[5], batch.rewards[0] = -0.0, np.nan
    batch.temperatures[-1] = np.float32(0.1)
    said: Any = [(0, 0, {}, "room 1"), (0, 3, {"reward": -0.0, "m": 2.0}, None), (2, 1, {"reward": 1.5}, "room 2")]
    batch = dataclasses.replace(batch, turns=said)
    path = archive.write_part(tmp_path, batch, attrs={"model": "tiny"})
    assert path == tmp_path / "archive" / "part-000012.zarr"
    assert_equal(archive.read_part(path), batch)
    assert archive.read_attrs(path)["model"] == "tiny"


@settings(max_examples=8)
@given(iteration=st.integers(1, 10**7), groups=st.integers(1, 3), size=st.integers(1, 3), length=st.floats(1, 30))
def test_any_shape_round_trips(
    tmp_path_factory: pytest.TempPathFactory, iteration: int, groups: int, size: int, length: float
) -> None:
    batch = make_batch(iteration, groups=groups, size=size, length=length)
    assert_equal(archive.read_part(archive.write_part(tmp_path_factory.mktemp("run"), batch, attrs={})), batch)


def test_no_trajectory_and_no_component_round_trip(tmp_path: Path) -> None:
    full = make_batch(1)
    values = {field.name: getattr(full, field.name) for field in dataclasses.fields(full)}
    arrays = {name: value[:0] for name, value in values.items() if isinstance(value, np.ndarray)}
    rest = {"cu_seqlens": full.cu_seqlens[:1], "components": {}, "prompt_ids": ()}
    empty = TrainBatch(**(values | arrays | rest))
    assert_equal(archive.read_part(archive.write_part(tmp_path, empty, attrs={})), empty)


def test_large_columns_are_sharded(tmp_path: Path) -> None:
    batch = make_batch(3, groups=8, size=8, length=2000)
    assert len(batch.tokens) > CHUNK_ROWS
    path = archive.write_part(tmp_path, batch, attrs={})
    tokens = zarr.open_group(str(path), mode="r")["token/id"]
    assert isinstance(tokens, zarr.Array)
    assert tokens.chunks == (CHUNK_ROWS,) and tokens.nchunks > 1
    assert tokens.shards is not None and tokens.shards[0] < len(batch.tokens) + CHUNK_ROWS
    assert_equal(archive.read_part(path), batch)


def test_plain_zarr_gives_the_same_mean_reward_and_lengths_sum(tmp_path: Path) -> None:
    batch = make_batch(2)
    path = archive.write_part(tmp_path, batch, attrs={})
    root = zarr.open_group(str(path), mode="r")
    assert np.mean(root["trajectory/reward"][...]) == batch.rewards.mean()
    assert np.sum(root["segment/length"][...]) == len(batch.tokens)
    assert np.sum(root["trajectory/num_segments"][...]) == len(root["segment/length"][...])
    assert root["segment/policy_version"][0] == -1  # the prompt is a segment of no version
    assert root.attrs["format"] == "pmdflow-rollouts/1" and root.attrs["Conventions"] == "CF-1.12"
    assert root["segment/length"].attrs["sample_dimension"] == "token"


def test_xarray_shows_four_tables(tmp_path: Path) -> None:
    path = archive.write_part(tmp_path, make_batch(2), attrs={})
    with xarray.open_datatree(path, engine="zarr", consolidated=False) as tree:
        assert set(tree.children) == {"token", "segment", "trajectory", "group"}
        assert tree["token"].dims.keys() == {"token"}
        assert float(tree["trajectory"]["reward"].mean()) == make_batch(2).rewards.mean()
        assert tree["group"]["prompt_id"].values[0] == "sum-2-0"


def test_repeating_keeps_the_part_and_one_catalog_row(tmp_path: Path) -> None:
    path = archive.write_part(tmp_path, make_batch(1), attrs={})
    before = (path / "zarr.json").stat()
    archive.write_part(tmp_path, make_batch(1), attrs={})
    assert (path / "zarr.json").stat().st_ino == before.st_ino
    assert len((tmp_path / "archive" / "catalog.jsonl").read_text().splitlines()) == 1


def test_a_part_says_which_claim_it_holds(tmp_path: Path) -> None:
    batch = make_batch(1)
    assert not archive.is_archived(tmp_path, 1, claim_lsn=40)
    path = archive.write_part(tmp_path, batch, attrs={})  # as runs before LSNs were recorded
    assert not archive.is_archived(tmp_path, 1, claim_lsn=40)
    archive.write_part(tmp_path, batch, attrs={}, claim_lsn=40)
    assert archive.is_archived(tmp_path, 1, claim_lsn=40) and not archive.is_archived(tmp_path, 1, claim_lsn=41)
    written = (path / "zarr.json").stat().st_ino
    archive.write_part(tmp_path, batch, attrs={}, claim_lsn=40)
    assert (path / "zarr.json").stat().st_ino == written
    archive.write_part(tmp_path, batch, attrs={}, claim_lsn=77)  # claimed anew after a resume
    assert archive.is_archived(tmp_path, 1, claim_lsn=77) and not archive.is_archived(tmp_path, 1, claim_lsn=40)
    assert_equal(archive.read_part(path), batch)


def test_a_claim_trained_again_replaces_the_superseded_part(tmp_path: Path) -> None:
    archive.write_part(tmp_path, make_batch(1), attrs={})
    again = dataclasses.replace(make_batch(1), version=7)
    path = archive.write_part(tmp_path, again, attrs={})
    assert_equal(archive.read_part(path), again)
    assert [row["version"] for row in archive.catalog(tmp_path)] == [7]
    assert sorted(p.name for p in path.parent.iterdir()) == ["catalog.jsonl", "part-000001.zarr"]


def test_a_plan_is_archived_with_its_claim(tmp_path: Path) -> None:
    plan = ClaimPlan(steps=np.array([1, 0, 3, 1], np.int32), num_steps=4, rule="by_hand", seed=7)
    path = archive.write_part(tmp_path, dataclasses.replace(make_batch(1), plan=plan), attrs={})
    found = archive.read_part(path).plan
    assert found is not None
    assert (found.num_steps, found.rule, found.seed) == (4, "by_hand", 7)
    np.testing.assert_array_equal(found.steps, plan.steps)
    assert found.steps.dtype == np.int32

    anew = dataclasses.replace(plan, steps=plan.steps % 2, num_steps=2)
    archive.write_part(tmp_path, dataclasses.replace(make_batch(1), plan=anew), attrs={})
    dealt = archive.read_part(path).plan
    assert dealt is not None and dealt.num_steps == 2, "trained again with other steps"


def test_a_part_older_than_plans_is_not_given_one(tmp_path: Path) -> None:
    path = archive.write_part(tmp_path, make_batch(1), attrs={})
    archive.write_part(tmp_path, dataclasses.replace(make_batch(1), plan=in_claim_order(4, 2)), attrs={})
    assert archive.read_part(path).plan is None


def test_crash_leftovers_are_ignored_and_overwritten(tmp_path: Path) -> None:
    archive.write_part(tmp_path, make_batch(2), attrs={})
    torn = tmp_path / "archive" / "part-000010.zarr.tmp"
    shutil.copytree(archive.part_path(tmp_path, 2), torn)
    shutil.rmtree(torn / "token")
    assert [archive.part_iteration(p) for p in archive.parts(tmp_path)] == [2]
    archive.write_part(tmp_path, make_batch(10), attrs={})
    assert [archive.part_iteration(p) for p in archive.parts(tmp_path)] == [2, 10]
    assert not torn.exists()
    assert archive.parts(tmp_path / "nowhere") == []


@pytest.mark.parametrize("text", ["", '{"attributes": {"for', "\0"])
def test_a_torn_part_is_named_and_the_others_are_read_without_it(tmp_path: Path, text: str) -> None:
    for iteration in (1, 2):
        archive.write_part(tmp_path, make_batch(iteration), attrs={})
    torn = archive.part_path(tmp_path, 1)
    (torn / "zarr.json").write_text(text)
    with pytest.raises(PmdflowError, match=r"part-000001\.zarr is not a readable archive part") as refused:
        archive.read_part(torn)
    assert "move it away" in str(refused.value.hint)
    shutil.rmtree(torn)
    assert [archive.read_part(part).iteration for part in archive.parts(tmp_path)] == [2]


def test_the_catalog_is_rebuilt_from_the_parts(tmp_path: Path) -> None:
    for iteration in (1, 2, 3):
        archive.write_part(tmp_path, make_batch(iteration), attrs={})
    file = tmp_path / "archive" / "catalog.jsonl"
    whole = archive.catalog(tmp_path)
    file.write_text(file.read_text().splitlines()[0] + '\n{"part": "part-00')
    assert archive.catalog(tmp_path) == whole
    archive.write_part(tmp_path, make_batch(2), attrs={})
    assert json.loads(file.read_text().splitlines()[-1])["part"] == "part-000002.zarr"
    file.unlink()
    assert archive.catalog(tmp_path) == whole


def test_foreign_directories_and_full_disks_are_named(tmp_path: Path) -> None:
    zarr.create_group(store=str(tmp_path / "other.zarr"))
    with pytest.raises(PmdflowError, match=r"other\.zarr.*format"):
        archive.read_part(tmp_path / "other.zarr")
    with pytest.raises(PmdflowError, match="not a readable"):
        archive.read_part(tmp_path / "missing.zarr")
    (tmp_path / "archive").write_text("in the way")
    with pytest.raises(PmdflowError, match="part-000001"):
        archive.write_part(tmp_path, make_batch(1), attrs={})


def test_a_group_has_one_prompt(tmp_path: Path) -> None:
    batch = make_batch(1)
    with pytest.raises(ValueError, match="more than one prompt id"):
        archive.write_part(tmp_path, dataclasses.replace(batch, prompt_ids=("other", *batch.prompt_ids[1:])), attrs={})
