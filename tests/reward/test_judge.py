"""The judge against a server on loopback that fails, is slow and limits rates."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from pmdflow.config.schema import RewardConfig
from pmdflow.reward import judge
from pmdflow.reward.item import ScoreItem
from pmdflow.reward.runner import RewardRunner
from tests.support.judge_server import JudgeServer, judge_server

KEY = "sk-a-key-that-nobody-may-see"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[JudgeServer]:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with judge_server() as state:
        yield state


def ask(server: JudgeServer, *completions: str, model: str = "m", timeout_s: float = 60.0, **args: Any) -> list[Any]:
    """The scores, or what was raised, of several completions at one time."""
    settings = {"base_url": server.url, "api_key_env": "JUDGE_KEY", "template": "{prompt} {completion}", **args}

    async def run() -> list[Any]:
        calls = (
            judge.score(
                prompt="?",
                completion=completion,
                metadata={"answer": "4"},
                timeout_s=timeout_s,
                model=model,
                **settings,
            )
            for completion in completions
        )
        return await asyncio.gather(*calls, return_exceptions=True)

    return asyncio.run(run())


def test_the_score_is_a_share_of_the_best(server: JudgeServer) -> None:
    assert ask(server, "7", "0", "10") == [0.7, 0.0, 1.0]
    assert ask(server, "3", max_score=4.0, request={"temperature": 0}) == [0.75]
    assert server.bodies[-1]["temperature"] == 0
    assert {body["path"] for body in server.bodies} == {"/v1/chat/completions"}
    assert server.keys == {f"Bearer {KEY}"}


def test_only_a_line_that_says_the_score_counts(server: JudgeServer) -> None:
    said = {
        "Good.\nscore: 8/10": 0.8,
        "A score: 2 is too low.\n**Final score:** 7.": 0.7,
        "score: .5": 0.05,
        "Score (0-10): 8": None,
        "I'd score 3 for style.\nGrade: 9": None,
        "score: 8,5": None,
    }
    answers = ask(server, *said, model="repeat", template="{completion}")
    assert [answer if isinstance(answer, float) else None for answer in answers] == list(said.values())


def test_templates_take_metadata_and_keep_other_braces(server: JudgeServer) -> None:
    assert ask(server, "{answer}", template='{"a": {unknown}} {completion} of {answer}') == [0.4]
    assert server.bodies[-1]["messages"][0]["content"] == '{"a": {unknown}} {answer} of 4'


@pytest.mark.parametrize("kind", ["500", "503", "429", "408", "drop"])
def test_what_passes_is_tried_again(kind: str, server: JudgeServer) -> None:
    assert ask(server, "8", model=f"{kind}:3") == [0.8]
    assert server.seen["? 8"] == 4


def test_many_requests_are_under_way_at_once(server: JudgeServer) -> None:
    assert ask(server, *(f"{number} 5" for number in range(20)), model="meet") == [0.5] * 20


def test_what_was_judged_is_not_judged_again_and_failures_are_not_remembered(server: JudgeServer) -> None:
    assert ask(server, "6", "6", "6", "7") == [0.6, 0.6, 0.6, 0.7]
    assert server.seen == {"? 6": 1, "? 7": 1}
    settings: dict[str, Any] = {"base_url": server.url, "model": "garbage:1", "template": "{completion}"}

    async def twice() -> tuple[Any, float]:
        arguments = {"prompt": "?", "completion": "9", "metadata": {}, "timeout_s": 60.0, **settings}
        (first,) = await asyncio.gather(judge.score(**arguments), return_exceptions=True)
        return first, await judge.score(**arguments)

    first, second = asyncio.run(twice())
    assert "no score from 0 to 10: 'what a task'" in str(first)
    assert second == 0.9
    assert [str(error)[:40] for error in ask(server, "11", "-1")] == ["the reply ends with no score from 0 to 1"] * 2


def test_a_deadline_ends_requests_and_retries(server: JudgeServer) -> None:
    for model in ("slow", "500"):
        (error,) = ask(server, "1", model=model, timeout_s=1.0)
        assert isinstance(error, TimeoutError)
        assert f"{server.url}/ did not answer within 0.9 s, retries included" in str(error)
    assert server.seen["? 1"] > 2


def test_the_key_is_in_no_message_and_no_log(server: JudgeServer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        (error,) = ask(server, "1", model="echo")
    assert f"{server.url}/ refused (its key is in JUDGE_KEY): " in str(error)
    assert "bad key: Bearer ***" in str(error)
    assert KEY not in str(error)
    assert KEY not in caplog.text


@pytest.mark.timeout(180)
def test_in_its_subprocess_a_late_judge_delays_nobody(server: JudgeServer) -> None:
    args = {"model": "slow:1", "base_url": server.url, "template": "{completion}"}
    entry = {"function": "pmdflow.reward.judge:score", "args": args}
    config = RewardConfig.model_validate({"functions": [entry], "timeout_s": 8.0})
    with RewardRunner(config) as runner:
        server.seen.update({f"{number} 5": 1 for number in range(30)})  # only the others are slow
        slow = runner.submit(ScoreItem(completion="1", prompt="?"))
        quick = [runner.submit(ScoreItem(completion=f"{number} 5", prompt="?")) for number in range(30)]
        assert [future.result(timeout=60).reward for future in quick] == [0.5] * 30
        assert not slow.done()
        late = slow.result(timeout=60)
        assert (late.outcome, "did not answer within 7.2 s" in late.message) == ("infra_failure", True)
