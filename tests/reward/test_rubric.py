"""The rubric: outcomes, bounds, and functions of every kind, which get what their signatures name."""

from __future__ import annotations

import asyncio
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmdflow.config.schema import RewardConfig
from pmdflow.reward.function import INPUTS, batched, bind
from pmdflow.reward.rubric import InvalidCompletion, Rubric, Scored, load_rubric
from tests.support.reward import make_config


def score(config: RewardConfig, completion: str) -> Scored:
    return load_rubric(config)(completion=completion, prompt="?", metadata={})


def rubric_of(function: Any, **args: Any) -> Rubric:
    return Rubric(functions=[bind(function, name="f", args=args)], invalid=-1.0, max_abs=1e6)


def together(rubric: Rubric, completions: Sequence[str]) -> list[Scored]:
    """Score many at once, as a concurrent subprocess does."""

    async def run() -> list[Scored]:
        return await asyncio.gather(*(rubric.score({"completion": text, "timeout_s": 1.0}) for text in completions))

    return asyncio.run(run())


# --- outcomes ---


@pytest.mark.usefixtures("functions")
def test_reward_is_the_weighted_sum_and_components_are_unweighted() -> None:
    config = RewardConfig.model_validate(
        {"functions": [{"function": "graders:length", "weight": 0.5}, {"function": "graders:obey", "weight": -2.0}]}
    )
    scored = score(config, "3.0")
    assert (scored.outcome, scored.reward) == ("scored", -4.5)
    assert scored.components == {"graders.length": 3.0, "graders.obey": 3.0}


@pytest.mark.usefixtures("functions")
def test_an_invalid_completion_gets_the_configured_reward() -> None:
    scored = score(make_config("graders:length", "graders:obey", invalid=-0.25), "invalid")
    assert (scored.outcome, scored.reward) == ("invalid", -0.25)
    assert scored.components == {"graders.length": 0.0, "graders.obey": 0.0}
    assert "no answer" in scored.message


@pytest.mark.usefixtures("functions")
@pytest.mark.parametrize(
    ("completion", "message"),
    [("nan", "nan"), ("-inf", "-inf"), ("raise", "KeyError: 'oops'"), ("text", "'1.0'"), ("none", "None")],
)
def test_whatever_is_not_a_finite_number_is_an_infra_failure(completion: str, message: str) -> None:
    scored = score(make_config(), completion)
    assert scored.outcome == "infra_failure"
    assert "graders.obey" in scored.message
    assert message in scored.message


@pytest.mark.usefixtures("functions")
def test_rewards_beyond_the_bound_are_refused_by_name() -> None:
    config = make_config("graders:obey", "graders:length", max_abs=100.0)
    assert score(config, "98").outcome == "scored"
    assert re.fullmatch(
        r"graders.obey: returned -1e\+300, beyond reward.max_abs \(100\).*", score(config, "-1e300").message
    )
    assert "graders.length: returned 200, beyond" in score(config, "1" + " " * 199).message
    assert "weighted sum" in score(config, "99" + " " * 90).message
    assert score(make_config(), "1e300").outcome == "infra_failure"


# --- what a function may be ---


def test_a_function_gets_what_its_signature_names() -> None:
    values = {name: name.upper() for name in INPUTS}

    def some(*, raw_completion: str, messages: Any, stop: str, other: int = 7) -> float:
        assert (raw_completion, messages, stop, other) == ("RAW_COMPLETION", "MESSAGES", "STOP", 7)
        return 1.0

    def everything(**given: Any) -> float:
        assert given == {**values, "model": "m"}
        return 1.0

    class Judge:
        async def __call__(self, completion: str, *, token_ids: Any, scale: float) -> float:
            assert (completion, token_ids) == ("COMPLETION", "TOKEN_IDS")
            return scale

    for function, args in ((some, {}), (everything, {"model": "m"}), (Judge(), {"scale": 1.0})):
        rubric = rubric_of(function, **args)
        assert rubric(**values) == Scored(outcome="scored", reward=1.0, components={"f": 1.0})
    assert rubric_of(some).inputs == {"raw_completion", "messages", "stop"}


@pytest.mark.parametrize(
    ("function", "args", "message"),
    [
        (lambda *, completions: 0.0, {}, "'completions', which is neither .* did you mean 'completion'"),
        (lambda *, completion, model: 0.0, {}, "'model', which is neither in args"),
        (lambda *, completion: 0.0, {"modle": "m"}, "args.modle: it takes no such argument"),
        (lambda *, model: 0.0, {"modle": "m", "model": 1}, "did you mean 'model'"),
        (lambda *, completion: 0.0, {"completion": "x"}, "args.completion: every function gets"),
        (lambda completion, /: 0.0, {}, "'completion' by position only"),
    ],
)
def test_a_signature_that_cannot_be_called_is_refused(function: Any, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bind(function, name="f", args=args)


def test_a_plain_function_may_have_an_event_loop_of_its_own() -> None:
    async def inner() -> float:
        return 3.0

    assert rubric_of(lambda *, completion: asyncio.run(inner()))(completion="x").reward == 3.0
    late = rubric_of(lambda *, completion: functools.partial(inner)())
    assert "declare the function with `async def`" in late(completion="x").message


@batched(size=4)
def lengths(*, completion: list[str], timeout_s: float, factor: float = 1.0) -> list[Any]:
    assert isinstance(timeout_s, float)
    assert len(completion) <= 4
    if "raise" in completion:
        raise KeyError(completion)
    return [InvalidCompletion("empty") if not text else factor * len(text) for text in completion]


@given(st.lists(st.sampled_from(["", "a", "bb", "ccc", "raise"]), max_size=11), st.randoms())
def test_a_batch_is_transport_only(completions: list[str], random: Any) -> None:
    """Companions, their order and their failures change nothing for anybody."""
    rubric = rubric_of(lengths, factor=2.0)
    alone = {text: rubric(completion=text, timeout_s=1.0) for text in set(completions)}
    assert {text: scored.outcome for text, scored in alone.items()} == {
        text: "invalid" if not text else "infra_failure" if text == "raise" else "scored" for text in alone
    }
    order = random.sample(completions, len(completions))
    assert together(rubric, order) == [alone[text] for text in order]


@pytest.mark.parametrize("answer", [[1.0], [1.0, 2.0, 3.0], "12", 1.0, None])
def test_a_batch_answers_with_one_number_each(answer: Any) -> None:
    @batched(size=2)
    async def wrong(*, completion: list[str]) -> Any:
        return answer if len(completion) == 2 else ["no"]

    for scored in together(rubric_of(wrong), ["a", "b"]):
        assert scored.outcome == "infra_failure"
    with pytest.raises(ValueError, match="at least one"):
        batched(size=0)


def test_coroutines_run_at_one_time() -> None:
    barrier = asyncio.Barrier(40)

    async def meet(*, completion: str) -> float:
        await barrier.wait()
        return float(completion)

    scored = together(rubric_of(meet), [str(number) for number in range(40)])
    assert [one.reward for one in scored] == list(range(40))


# --- loading ---


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.graders:obey", "cannot import nowhere.graders.*No module named 'nowhere'"),
        ("graders:obay", "did you mean 'obey'"),
        ("graders:os", "a module, not a function"),
        ("broken:f", "cannot import broken: ZeroDivisionError"),
    ],
)
def test_an_unusable_path_is_named_with_its_cause(functions: Path, path: str, message: str) -> None:
    (functions / "broken.py").write_text("1 / 0\n")
    with pytest.raises(ValueError, match=rf"reward\.functions\[1\].*{path}.*{message}"):
        load_rubric(make_config("graders:length", path))


@pytest.mark.usefixtures("functions")
def test_a_function_listed_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="twice"):
        load_rubric(make_config("graders:obey", "graders:obey"))
