"""An episode on its page: turns, calls, rewards, durations, branches, and what its program wrote."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from pmdflow.agents.diary import SUFFIX, Diary
from pmdflow.dashboard import episode
from pmdflow.dashboard.episode import episode_of
from pmdflow.dashboard.server import make_app
from pmdflow.store.archive import write_part
from tests.support.filled_store import admit, lease_all, ready_store, score_all, segment
from tests.support.fixture_run import FixtureRun


def told(run: Path, name: str, *lines: dict[str, Any], output: str = "") -> None:
    folder = run / "logs" / "agents"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}{SUFFIX}").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / f"{name}.log").write_text(output)


def turn(at: float, *calls: str, recorded: bool = False, **others: Any) -> dict[str, Any]:
    return {
        "kind": "turn", "time": at, "asked": at - 0.5, "tokens": 7, "calls": calls, "finish": "stop", "branch": 0,
        "recorded": recorded, **others,
    }  # fmt: skip


def converse(run: Path) -> None:
    """Trajectory 0: a program that was killed, and the one after it."""
    told(run, "0-1", {"kind": "start", "time": 100.0}, turn(101.0, "add"), output="first <b>words</b>\n")
    told(
        run, "0-3", {"kind": "start", "time": 103.0}, turn(103.5, "add", recorded=True), turn(105.0, branch=1),
        {"kind": "reward", "time": 105.5, "rewards": {"bonus": 0.25}},
        {"kind": "end", "time": 106.0, "why": "its trajectory is complete"}, output="second words\n",
    )  # fmt: skip


def archived(run: FixtureRun) -> int:
    """A group with an episode of two branches, archived; returns its first branch."""
    with ready_store(run.run_dir / "store", durability="always") as store:
        admit(store)
        first, second = lease_all(store)
        store.append([segment(first, 3)])
        forked = store.fork(first.trajectory, first.epoch, 1)
        store.append([segment(replace(first, epoch=forked.epoch), 4, offset=1, stop="stop")])
        store.append([segment(second, 4, stop="stop")])
        score_all(store)
        assert store.claim(1, 0, 0.0).status == "claimed"
        write_part(run.run_dir, store.read_claim(1), attrs={})
    return first.trajectory


def page_of(run: FixtureRun, path: str) -> str:
    return TestClient(make_app(run.run_dir), base_url="http://127.0.0.1").get(path).text


def test_its_page_has_turns_calls_rewards_durations_branches_and_output(tmp_path: Path) -> None:
    run = FixtureRun(tmp_path / "quick")
    run.iterate(1, archive=False)
    first = archived(run)
    converse(run.run_dir)
    page = page_of(run, f"/trajectories/1/{first}")
    for text in (
        "2 programs, 6.0 s, ended: its trajectory is complete", "<dt>turns</dt><dd>2</dd>",
        "<dt>branches</dt><dd>2</dd>", "<td>0.50 s</td>", '<td class="left">add</td>', "<td>bonus</td><td>0.250</td>",
        "first &lt;b&gt;words&lt;/b&gt;", "second words", "Its branches",
    ):  # fmt: skip
        assert text in page, text
    branch = page.partition("Its branches")[2]
    assert f'<a href="/trajectories/1/{first}">{first}</a>' in branch
    assert f"<td>{first}</td><td>1</td>" in branch
    (other,) = {int(part.split('"')[0]) for part in branch.partition("</table>")[0].split("/trajectories/1/")[1:]} - {
        first
    }
    assert "first &lt;b&gt;" in page_of(run, f"/trajectories/1/{other}")  # of whichever branch


def test_a_live_episode_has_its_page(tmp_path: Path) -> None:
    run = FixtureRun(tmp_path / "quick")
    run.iterate(1, archive=False)
    with ready_store(run.run_dir / "store", durability="always") as store:
        admit(store)
        first, _ = lease_all(store)
        store.append([segment(first, 3)])
        store.fork(first.trajectory, first.epoch, 2)
        told(run.run_dir, f"{first.trajectory}-1", {"kind": "start", "time": 100.0}, turn(101.0))
        page = page_of(run, f"/trajectories/live/{first.trajectory}")
    assert "1 program, 1.0 s, running" in page
    assert "Its branches" in page
    assert "Nothing." in page


def test_what_no_program_worked_on_has_no_episode(tmp_path: Path) -> None:
    run = FixtureRun(tmp_path / "quick")
    run.iterate(1)
    assert episode_of(run.run_dir, 0) is None


def test_torn_lines_and_long_outputs_are_read_as_far_as_they_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(episode, "OUTPUT_BYTES", 20)
    told(tmp_path, "7-10", {"kind": "start", "time": 3.0}, output="é" * 100 + "end of ten")
    told(tmp_path, "7-9", {"kind": "start", "time": 1.0}, output="x" * 100)
    told(tmp_path, "71-1", {"kind": "start", "time": 0.0})
    with (tmp_path / "logs" / "agents" / f"7-10{SUFFIX}").open("a") as file:
        file.write('{"kind": "tur')
    view = episode_of(tmp_path, 7)
    assert view is not None
    assert (view.programs, view.lasted_s, view.ended) == (2, 2.0, "")
    assert view.output.strip().endswith("end of ten")
    assert len(view.output) <= 20


def test_a_diary_that_cannot_be_written_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    Diary(tmp_path / "file" / "1-1").tell("start")
    Diary().tell("start")
