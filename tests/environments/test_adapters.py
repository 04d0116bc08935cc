"""Environments of other libraries, as a trajectory meets them: verifiers, OpenEnv, Gymnasium."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest

from pmdflow.config.imports import load_module
from pmdflow.config.schema import EnvironmentConfig
from pmdflow.config.try_import import try_import
from pmdflow.environments.host import Hosts
from pmdflow.environments.observed import Speech
from pmdflow.environments.protocol import Reply
from pmdflow.rollout.session import Session
from pmdflow.rollout.turns import Turn
from tests.support.environments import tokenizer, tokens_of
from tests.support.paths import CONFIGS

WAIT_S = 60.0
LAYOUT = {"rooms": 3, "key": 1, "door": 3, "start": 2}
WAY = ["left", "take", "right", "right", "open"]
SAID = ["room 1: key\n", "taken\n", "room 2\n", "room 3: door\n", "open\n"]


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    hosts = Hosts()
    yield hosts
    assert hosts.close(timeout_s=WAIT_S) == []


def example(name: str, library: str) -> ModuleType:
    if find_spec(library) is None:
        pytest.skip(f"needs uv sync --extra {library}")
    module: ModuleType = load_module(f"{CONFIGS / 'examples'}:{name}:make")
    sys.path.remove(str(CONFIGS / "examples"))
    return module


def make_session(make: Callable[[], Any], hosts: Hosts, metadata: dict[str, Any], **others: Any) -> Session:
    return Session(
        make=make, hosts=hosts, speech=Speech(tokenizer=tokenizer), key="run/7", prompt="World 1.", metadata=metadata,
        config=EnvironmentConfig(factory="a:b", timeout_s=WAIT_S), **{"said": None, "turns": [], **others},
    )  # fmt: skip


def turn(session: Session, action: str | None) -> Reply:
    session.start(None if action is None else tokens_of(f"{action}\n"))
    assert session.call is not None
    wait([session.call], timeout=WAIT_S)
    reply = session.poll()
    assert reply is not None and not reply.problem, reply
    return reply


def play(session: Session, way: list[str]) -> list[Reply]:
    """All of it, from the first room."""
    replies = [turn(session, None), *(turn(session, action) for action in way)]
    texts = [tokenizer.decode(reply.tokens) for reply in replies]
    said = ["room 2\n", *SAID[: len(way)]]
    assert texts[:-1] == said[:-1] and texts[-1] in (said[-1], "")
    return replies


def test_an_environment_of_verifiers_and_its_rubric(hosts: Hosts) -> None:
    module = example("verifiers_world", "verifiers")
    last = play(make_session(module.make, hosts, LAYOUT), WAY)[-1]
    assert last.done and last.note is not None
    assert last.note.rewards["reward"] == 1.0 and last.note.rewards["opened"] == 1.0
    lost = play(make_session(module.make, hosts, LAYOUT), ["left", "take"])
    assert not lost[-1].done


def test_an_environment_of_verifiers_goes_on_from_its_record(hosts: Hosts) -> None:
    module = example("verifiers_world", "verifiers")
    past = [Turn(action=tokens_of(f"{a}\n"), observed=tokens_of(o)) for a, o in zip(WAY[:3], SAID[:3], strict=True)]
    session = make_session(module.make, hosts, LAYOUT, said=tokens_of("room 2\n"), turns=past)
    assert tokenizer.decode(turn(session, "right").tokens) == "room 3: door\n"
    assert turn(session, "open").done


def test_an_openenv_server(hosts: Hosts) -> None:
    module = example("openenv_world", "openenv")
    replies = play(make_session(module.make, hosts, LAYOUT), WAY)
    notes = [reply.note for reply in replies if reply.note is not None]
    assert [note.key for note in notes] == ["2", "1", "1 with key", "2 with key", "3 with key", "3 with key"]
    assert replies[-1].done and [note.rewards.get("reward") for note in notes] == [None, 0.0, 0.0, 0.0, 0.0, 1.0]


def test_an_openenv_server_that_is_not_there_is_named(hosts: Hosts) -> None:
    if find_spec("openenv") is None:
        pytest.skip("needs uv sync --extra openenv")
    from pmdflow.environments.openenv import OpenEnv

    session = make_session(lambda: OpenEnv("http://127.0.0.1:9", timeout_s=2), hosts, {})
    session.start(None)
    assert session.call is not None
    wait([session.call], timeout=WAIT_S)
    reply = session.poll()
    assert reply is not None and reply.done and "the trajectory ends: " in reply.problem


def test_a_gymnasium_environment(hosts: Hosts) -> None:
    if find_spec("gymnasium") is None:
        pytest.skip("needs uv sync --extra gymnasium")
    from pmdflow.environments.gymnasium import Gymnasium

    def make() -> Gymnasium:
        names = ["left", "down", "right", "up"]
        args = {"is_slippery": False, "desc": ["SF", "HG"]}
        return Gymnasium("FrozenLake-v1", args, actions=names, says="{observation}\n", is_state=True)

    session = make_session(make, hosts, {"seed": 3})
    replies = [turn(session, action) for action in (None, "right", "down")]
    assert [tokenizer.decode(reply.tokens) for reply in replies] == ["0\n", "1\n", "3\n"]
    notes = [reply.note for reply in replies if reply.note is not None]
    assert [(note.key, note.rewards) for note in notes] == [("0", {}), ("1", {"reward": 0.0}), ("3", {"reward": 1.0})]
    assert replies[-1].done


@pytest.mark.parametrize("library", ["verifiers", "openenv", "gymnasium"])
def test_a_library_that_is_missing_is_named_with_the_remedy(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith((f"{library}.", f"pmdflow.environments.{library}"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    problem, _ = try_import(f"pmdflow.environments.{library}:Any", called=True)
    assert problem is not None and f"run `uv sync --extra {library}`" in problem
