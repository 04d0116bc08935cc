"""Trajectories that only the store has, on the pages, while a writer goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from pmdflow.dashboard.live import live_detail, live_rows
from pmdflow.dashboard.server import make_app
from pmdflow.dashboard.trajectories import Filter, select
from pmdflow.store import StoreError, TrajectoryStore
from pmdflow.store.archive import write_part
from tests.support.filled_store import admit, complete, lease_all, quota, ready_store, segment
from tests.support.fixture_run import FixtureRun, make_batch


@pytest.fixture
def run(tmp_path: Path) -> FixtureRun:
    made = FixtureRun(tmp_path / "quick")
    made.iterate(1, archive=False)
    return made


@pytest.fixture
def store(run: FixtureRun) -> Iterator[TrajectoryStore]:
    """What a run holds: a claimed group, a ready one, and one of which a trajectory has 3 tokens of v0 and 2 of v1."""
    with ready_store(run.run_dir / "store", durability="always") as held:
        admit(held)
        complete(held)
        admit(held, 1)
        complete(held)
        assert held.claim(1, 0, 0.0).groups == (0,)
        admit(held, 2)
        (first, *_) = lease_all(held)
        held.append([segment(first, 3, next_version=1)])
        held.publish(1)
        held.set_quota(quota(1))
        held.append([segment(first, 2, offset=3, version=1)])
        yield held


def client_of(run: FixtureRun) -> TestClient:
    return TestClient(make_app(run.run_dir), base_url="http://127.0.0.1")


def test_rows_say_where_a_trajectory_is(run: FixtureRun, store: TrajectoryStore) -> None:
    rows = live_rows(run.run_dir)
    assert [(row.trajectory, row.state, row.iteration, row.length, row.reward) for row in rows] == [
        (0, "claimed", 1, 4, 0.0),
        (1, "claimed", 1, 4, 1.0),
        (2, "ready", None, 4, 2.0),
        (3, "ready", None, 4, 3.0),
        (4, "generating", None, 5, None),
        (5, "generating", None, 0, None),
    ]
    assert [(row.first_version, row.last_version, row.versions) for row in rows[3:]] == [
        (0, 0, 1),
        (0, 1, 2),
        (-1, -1, 0),
    ]


def test_the_table_shows_the_store_as_it_is_at_each_request(run: FixtureRun, store: TrajectoryStore) -> None:
    client = client_of(run)
    assert "No archived trajectory matches" in client.get("/trajectories").text
    page = client.get("/trajectories?where=live").text
    assert "6 trajectories" in page and "v0 to v1" in page and page.count("<td>generating</td>") == 2
    assert 'href="/trajectories/live/4"' in page
    assert "1 trajectories" in client.get("/trajectories?where=live&multi_version=1").text
    assert "2 trajectories" in client.get("/trajectories?where=live&reward_min=2").text
    store.discard(2, "enough of it")
    assert "4 trajectories" in client.get("/trajectories?where=live").text


def test_what_has_no_reward_is_sorted_last_and_the_state_has_its_column(
    run: FixtureRun, store: TrajectoryStore
) -> None:
    rows = live_rows(run.run_dir)
    for descending, expected in ((True, [3, 2, 1, 0, 4, 5]), (False, [0, 1, 2, 3, 4, 5])):
        found = select(rows, Filter(live=True, sort="reward", descending=descending))
        assert [row.trajectory for row in found] == expected
    states = [row.state for row in select(rows, Filter(live=True, sort="stop", descending=False))]
    assert states == ["claimed"] * 2 + ["generating"] * 2 + ["ready"] * 2


def test_a_trajectory_grows_token_by_token_on_a_page_that_comes_again(run: FixtureRun, store: TrajectoryStore) -> None:
    detail = live_detail(run.run_dir, 4, None)
    assert detail is not None
    assert [token.text.strip() for token in detail.tokens] == ["5", "6", "7", "400", "401", "402", "403", "404"]
    assert [token.version for token in detail.tokens] == [-1] * 3 + [0] * 3 + [1] * 2
    assert [token.starts_segment for token in detail.tokens] == [False] * 3 + [True, False, False, True, False]
    assert detail.tokens[4].hint == "version 0, logprob -50.1250, not trained yet, id 401"
    assert detail.versions == [(0, 3, 3), (1, 2, 2)]
    assert [row.trajectory for row in detail.siblings] == [4, 5]
    client = client_of(run)
    page = client.get("/trajectories/live/4").text
    assert 'http-equiv="refresh"' in page and "without a gradient" not in page
    tokens = page.split('<div class="tokens">')[1].split("</div>")[0]
    assert tokens.count('class="tok v') == 5 and "masked" not in tokens
    empty = live_detail(run.run_dir, 5, None)
    assert empty is not None and len(empty.tokens) == 3
    done = client.get("/trajectories/live/2").text
    assert "refresh" not in done and "<dd>2.000</dd>" in done


def test_once_archived_it_is_found_in_the_archive_and_there_alone(run: FixtureRun, store: TrajectoryStore) -> None:
    batch = make_batch(1)
    write_part(run.run_dir, batch, attrs={})
    assert [row.trajectory for row in live_rows(run.run_dir)] == [2, 3, 4, 5]
    client = client_of(run)
    answer = client.get(f"/trajectories/live/{batch.trajectories[3]}", follow_redirects=False)
    assert answer.headers["location"] == f"/trajectories/1/{batch.trajectories[3]}"
    assert [client.get(f"/trajectories/live/{number}").status_code for number in (77, 10**30)] == [404, 404]


def test_without_a_store_the_table_is_empty_and_a_damaged_one_is_said(run: FixtureRun) -> None:
    client = client_of(run)
    assert "The store holds no trajectory that matches" in client.get("/trajectories?where=live").text
    assert client.get("/trajectories/live/1").status_code == 404
    with ready_store(run.run_dir / "store") as held:
        admit(held)
    log = next((run.run_dir / "store").glob("*.log"))
    log.write_bytes(b"x" * 64 + log.read_bytes()[64:])
    with pytest.raises(StoreError):
        live_rows(run.run_dir)
    assert "the store cannot be read: " in client.get("/trajectories?where=live").text
    assert client.get("/trajectories/live/0").status_code == 503
