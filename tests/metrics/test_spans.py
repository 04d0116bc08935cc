"""The buffer of an actor's spans, and their names."""

from __future__ import annotations

import re
import threading
from typing import get_args

import pytest

from pmdflow.metrics.spans import SpanBuffer, Wait, Work, is_bubble
from tests.support.fixture_run import span
from tests.support.paths import ROOT

PACKAGE = ROOT / "pmdflow"


def test_spans_are_drained_once_and_in_the_documented_form() -> None:
    ticks = iter([1.0, 2.5])
    buffer = SpanBuffer("rollout-0", clock=lambda: next(ticks))
    with buffer.span("generate", version=3) as attrs:
        attrs["tokens"] = 7
    drained = buffer.drain()
    assert drained == [span("generate", 1.0, 2.5) | {"attrs": {"version": 3, "tokens": 7}}]
    assert buffer.drain() == []


def test_a_span_ends_when_its_body_raises() -> None:
    buffer = SpanBuffer("learner-0")
    with pytest.raises(RuntimeError), buffer.span("step"):
        raise RuntimeError
    assert [s["name"] for s in buffer.drain()] == ["step"]


def test_a_full_buffer_drops_the_oldest_and_counts() -> None:
    buffer = SpanBuffer("reward", capacity=3)
    threads = [threading.Thread(target=lambda: [buffer.add("score", i, i + 1) for i in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(buffer.drain()) == 3
    assert buffer.dropped == 4 * 50 - 3
    (event,) = buffer.losses()
    assert event.kind == "spans_dropped" and event.attrs == {"actor": "reward", "spans": 197}
    assert "197 oldest spans" in event.message
    assert buffer.losses() == []
    for i in range(4):
        buffer.add("score", i, i + 1)
    assert [event.attrs["spans"] for event in buffer.losses()] == [1]
    with pytest.raises(ValueError, match="capacity is 0"):
        SpanBuffer("reward", capacity=0)


def test_bubbles_are_the_names_that_begin_with_wait() -> None:
    assert all(is_bubble(name) for name in get_args(Wait))
    assert not any(is_bubble(name) for name in get_args(Work))
    assert is_bubble("wait_weights"), "a name of older runs"


def test_every_actor_says_that_spans_were_dropped() -> None:
    for file in PACKAGE.rglob("*.py"):
        text = file.read_text()
        if file.name == "actor.py" and file.parent.name == "rollout":
            text += (file.parent / "telling.py").read_text()  # to which it gives them
        for name in re.findall(r"(self\.\w+) = SpanBuffer\(", text):
            assert f"{name}.drain()" in text and f"{name}.losses()" in text, f"{file}: {name}"


def test_every_name_is_given_by_some_actor() -> None:
    """That no actor gives another one, mypy sees to: `SpanBuffer` takes a `SpanName`."""
    rooms = [file for file in PACKAGE.rglob("*.py") if file.parent.name not in ("metrics", "dashboard")]
    sources = "".join(file.read_text() for file in rooms)
    assert [name for name in get_args(Work) + get_args(Wait) if f'"{name}"' not in sources] == []
