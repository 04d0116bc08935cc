"""`pmdflow store`: groups of a dead and of a live run, and the request by which one is discarded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pmdflow.errors import PmdflowError
from pmdflow.learner.checkpoint.manifest import Manifest
from pmdflow.run.checkpoints import require_store_of
from pmdflow.run.directory import RunDirectory
from pmdflow.run.discards import MAX_REASON_BYTES, DiscardRequest, pending, take_up
from pmdflow.run.stored import stored
from pmdflow.store import TrajectoryStore
from tests.support.filled_store import admit, complete, ready_store


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    """A run that died with an open claim of group 0, with group 1 ready and group 2 not begun."""
    store = ready_store(tmp_path / "store")
    admit(store)
    complete(store)
    admit(store, 1)
    complete(store)
    admit(store, 2)
    assert store.claim(1, 0, 0.0).groups == (0,)
    store.close()
    return tmp_path


def groups(run: Path) -> list[int]:
    store = TrajectoryStore.read(run / "store")
    return [row["group"] for row in store.groups()]


def test_groups_are_listed_and_shown(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert stored(run, "list", group=None, reason=None) == 0
    header, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
    assert header[:4] == ["group", "state", "iteration", "members"]
    assert [row[:4] for row in rows] == [
        ["0", "claimed", "1", "2"],
        ["1", "ready", "-", "2"],
        ["2", "partial", "-", "2"],
    ]
    assert stored(run, "show", group=1, reason=None) == 0
    shown = capsys.readouterr().out
    assert "prompt: '1+1='" in shown
    assert '"answer": "2"' in shown
    assert "trajectory 2: scored, 4 tokens, versions 0 to 0, stop stop, reward 2" in shown


@pytest.mark.parametrize("group", [0, 1, 2])
def test_a_group_of_a_dead_run_is_discarded_at_once(run: Path, group: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert stored(run, "discard", group=group, reason="its answer is wrong") == 0
    assert capsys.readouterr().out == f"discarded group {group}\n"
    assert groups(run) == [other for other in range(3) if other != group]
    assert list(pending(run)) == []
    with pytest.raises(PmdflowError, match=f"group {group} is not in the store"):
        stored(run, "discard", group=group, reason="again")


def test_of_a_live_run_it_is_asked_by_a_file(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunDirectory, "is_live", lambda path: True)
    stored(run, "discard", group=1, reason='says "no"')
    stored(run, "discard", group=1, reason='says "no"')
    assert groups(run) == [0, 1, 2]
    (run / "requests" / "discard-9.json").write_text("{")
    assert [(path.name, request) for path, request in pending(run)] == [
        ("discard-1.json", DiscardRequest(group=1, reason='says "no"'))
    ]


def test_what_is_missing_is_said(run: Path, tmp_path: Path) -> None:
    for action, group, reason, said in (
        ("discard", None, "why", "needs a group"),
        ("show", None, None, "needs a group"),
        ("discard", 1, None, "needs a reason"),
        ("show", 9, None, "group 9 is not in the store"),
    ):
        with pytest.raises(PmdflowError, match=said):
            stored(run, action, group=group, reason=reason)  # type: ignore[arg-type]
    with pytest.raises(PmdflowError, match="has no store"):
        stored(tmp_path / "other", "list", group=None, reason=None)


@pytest.mark.parametrize(
    ("reason", "said"),
    [("bad \udcff", "no UTF-8 text at character 4"), ("x" * 4097, "4097 bytes, at most 4096"), (" ", "needs a reason")],
)
@pytest.mark.parametrize("live", [False, True])
def test_a_reason_that_cannot_be_kept_is_refused_by_the_command(
    run: Path, monkeypatch: pytest.MonkeyPatch, reason: str, said: str, live: bool
) -> None:
    monkeypatch.setattr(RunDirectory, "is_live", lambda path: live)
    with pytest.raises(PmdflowError, match=said) as refused:
        stored(run, "discard", group=1, reason=reason)
    assert refused.value.hint
    assert groups(run) == [0, 1, 2]
    assert not (run / "requests").exists()


def test_the_longest_reason_is_kept_by_the_store(run: Path) -> None:
    assert stored(run, "discard", group=1, reason="x" * MAX_REASON_BYTES) == 0


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ('{"group": 0, "reason": "bad \\udcff"}', "no UTF-8 text"),
        ('{"group": 1180591620717411303424, "reason": "x"}', "1180591620717411303424 is no group"),
        ('{"group": 1e999, "reason": "x"}', "inf is no group"),
        ('{"group": -1, "reason": "x"}', "-1 is no group"),
        ('{"group": 0, "reason": null}', "needs a reason"),
    ],
)
def test_a_request_that_cannot_be_is_an_event_and_goes(tmp_path: Path, asked: str, said: str) -> None:
    """Otherwise it would stop the run, and stop it again at each resume."""
    (tmp_path / "requests").mkdir()
    (tmp_path / "requests" / "discard-0.json").write_text(asked)
    events: list[str] = []

    def discard(group: int, reason: str) -> str:
        raise AssertionError(f"{group} {reason} reached the store")

    take_up(tmp_path, discard, lambda message, **attrs: events.append(message))
    assert len(events) == 1
    assert events[0].startswith("request 'discard-0.json' is refused")
    assert said in events[0]
    assert list((tmp_path / "requests").iterdir()) == []


def test_a_store_that_another_program_holds_is_said(run: Path) -> None:
    holder = TrajectoryStore(run / "store", groups_per_iteration=1, lookahead=0, max_staleness=None)
    with pytest.raises(PmdflowError) as refused:
        stored(run, "discard", group=1, reason="why")
    assert "wait until the other program" in (refused.value.hint or "")
    holder.close()


def test_a_damaged_store_is_said(run: Path) -> None:
    log = next((run / "store").glob("*.log"))
    with open(log, "r+b") as file:
        file.seek(300)
        file.write(b"xx")
    with pytest.raises(PmdflowError, match=log.name) as refused:
        stored(run, "discard", group=1, reason="why")
    assert "from a copy" in (refused.value.hint or "")


def test_a_store_whose_log_is_empty_is_said_with_the_way_on(run: Path) -> None:
    for file in (run / "store").glob("*.log"):
        file.write_bytes(b"")
    with pytest.raises(PmdflowError, match=r"its log files fail: .*store") as empty:
        stored(run, "list", group=None, reason=None)
    assert "from a copy" in str(empty.value.hint)


def test_a_store_that_is_older_than_its_checkpoint_is_refused_with_both_places(tmp_path: Path) -> None:
    manifest = Manifest.new(tmp_path / "checkpoints", iteration=10, version=10, lsn=4711)
    require_store_of(manifest, store=tmp_path / "store", lsn=4711)
    with pytest.raises(
        PmdflowError, match=r"store ends at record 4710.*iteration-000010\.json covers.*4711"
    ) as refused:
        require_store_of(manifest, store=tmp_path / "store", lsn=4710)
    assert refused.value.hint
