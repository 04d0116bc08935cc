"""What every algorithm must keep, tried on made-up claims: by our tests, and by `pmdflow check-algorithm`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from pmdflow.config.imports import locate
from pmdflow.config.schema import LearnerConfig
from pmdflow.learner.algorithm import Algorithm, Terms
from pmdflow.learner.algorithms import find_algorithm
from pmdflow.learner.view import COLUMN, ClaimView, Credit, Need, State
from pmdflow.types import Int64

SIZES = (4, 3, 1, 4, 2)
"""Episodes of each made-up group: the third is alone, the fourth has equal rewards."""
TOLERANCE = 1e-6


def check_algorithm(name: str, *, components: Sequence[str] = (), settings: Mapping[str, Any] | None = None) -> str:
    """Try an algorithm; says what it kept.

    Args:
        name: A name of the table, or an import path `package.module:name`, looked for in this directory first.
        components: Reward components that it reads.
        settings: Its settings, where they are not to be the defaults.

    Raises:
        ValueError: there is no such algorithm, or it breaks a rule; names each, with what was seen.
    """
    path = locate(name, [Path()]) if ":" in name else name
    find_algorithm(path)
    problems = []
    for title, case in CASES.items():
        try:
            case(Trial(path, components=components, settings=settings or {}))
        except Exception as error:
            problems.append(f"{title}: {error if isinstance(error, AssertionError) else repr(error)}")
    if problems:
        raise ValueError(f"{name} breaks {len(problems)} of {len(CASES)} rules:\n" + "\n".join(problems))
    return f"{name} keeps all {len(CASES)} rules:\n" + "\n".join(f"  {title}" for title in CASES)


class Trial:
    """An algorithm and the claims that it is tried on."""

    def __init__(self, name: str, *, components: Sequence[str] = (), settings: Mapping[str, Any] | None = None) -> None:
        self.algorithm: Algorithm = find_algorithm(name)
        given = LearnerConfig.model_construct(**{**LearnerConfig().model_dump(), "algorithm": name})
        given = given.model_copy(update={"settings": dict(settings or {})})
        self.learner = self.algorithm.configured(given)
        self._components = tuple(components) or ("first", "second")

    def view(self, *, seed: int = 0, sizes: Sequence[int] = SIZES, iteration: int = 1) -> ClaimView:
        """A made-up claim; nothing in it can be written to."""
        random = np.random.default_rng(seed)
        count = sum(sizes)
        lengths = random.integers(1, 6, count)
        total = int(lengths.sum())
        groups = np.repeat(np.arange(len(sizes)), sizes)
        components = {name: random.integers(0, 2, count).astype(float) for name in self._components}
        components = {name: np.where(groups == 3, 1.0, values) for name, values in components.items()}
        rewards = next(iter(components.values()))
        everything: dict[str, Any] = {
            "reference": -random.random(total).astype(np.float32) * 4,
            "behavior": -random.random(total).astype(np.float32) * 4,
            "entropies": random.random(total).astype(np.float32),
            "entropy_flow": random.standard_normal(total).astype(np.float32),
            "versions": random.integers(0, 3, total).astype(np.int32),
            "turns": np.zeros(total, np.int64),
            "turn_keys": random.integers(0, 3, total),
            "turn_rewards": random.random(total),
            "trained": random.random(total) < 0.8,
            "tokens": random.integers(0, 50, total),
            "teacher": -random.random(total).astype(np.float32) * 4,
            "top": np.log(random.dirichlet(np.ones(4), (total, 2))).astype(np.float32),
        }
        assert everything.keys() == set(get_args(Need)), "every array that can be needed is here"
        view = ClaimView(
            iteration=iteration,
            version=iteration - 1,
            rewards=rewards,
            components=components,
            correct=rewards >= 0.5,
            groups=groups,
            prompt_ids=tuple(f"prompt-{group}" for group in groups),
            cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            per_token={
                **{name: everything[name] for name in self.algorithm.needs},
                **{f"{COLUMN}{name}": random.random(total) for name in self.algorithm.columns},
            },
        )
        for values in (view.rewards, view.correct, view.groups, view.cu_seqlens, *view.per_token.values()):
            values.flags.writeable = False
        return self._with_totals(view, [view])

    def parts(self, view: ClaimView) -> list[ClaimView]:
        """Its groups in two views, as two ranks see them."""
        half = view.groups.max(initial=0) // 2
        cut = [part(view, np.flatnonzero(chosen)) for chosen in (view.groups <= half, view.groups > half)]
        return [self._with_totals(own, cut) for own in cut]

    def state(self) -> State:
        """The first state."""
        return {} if self.algorithm.state is None else self.algorithm.state()

    def credit(self, view: ClaimView, state: State | None = None) -> Credit:
        """Its answer, checked."""
        return self.algorithm.credit(view, self.learner, self.state() if state is None else state).checked(view)

    def gradient(self, view: ClaimView, credit: Credit, rows: Int64, logprobs: Tensor, *, scope: bool = True) -> Any:
        """Of `rows` as one micro-batch: the gradient by the log-probs, the count that its loss divides by, the mask."""
        own = part(view, rows)
        tokens = _tokens(view, rows)
        chosen = logprobs[tokens].detach().clone().requires_grad_()
        trained = torch.from_numpy(np.arange(len(tokens)) % 4 != 3)
        cu = torch.from_numpy(own.cu_seqlens)
        ones = torch.ones(len(rows), dtype=torch.float64)
        per_sequence = credit.per == "sequence"
        terms = Terms(
            logprobs=chosen,
            entropies=torch.ones_like(chosen),
            anchor=logprobs[tokens].detach() - 0.01,
            behavior=logprobs[tokens].detach() - 0.02,
            sequence_credit=torch.from_numpy(credit.values[rows]) if per_sequence else None,
            token_credit=None if per_sequence else torch.from_numpy(credit.values[tokens]),
            weights=ones if credit.weights is None else torch.from_numpy(credit.weights[rows]),
            trained=trained if not scope else torch.from_numpy(_trained(len(logprobs))[tokens]),
            scope=torch.ones(len(tokens), dtype=torch.bool) if scope else trained,
            cu_seqlens=cu,
            max_tokens=16,
            columns={name: torch.from_numpy(np.array(values)) for name, values in own.columns.items()},
            alternatives=None if self.algorithm.alternatives is None else logprobs[tokens].detach()[:, None] - 0.5,
            iteration=view.iteration,
        )
        loss = self.algorithm.loss(terms, self.learner)
        (found,) = torch.autograd.grad(loss, chosen, allow_unused=True)
        counts = torch.nn.functional.pad(terms.trained.cumsum(0), (1, 0))[cu].diff()
        units = (counts > 0).sum() if self.algorithm.mean_over == "sequences" else counts.sum()
        return torch.zeros_like(chosen) if found is None else found, int(units), terms.trained

    def _with_totals(self, view: ClaimView, views: Sequence[ClaimView]) -> ClaimView:
        if self.algorithm.totals is None:
            return view
        sums: dict[str, float] = {}
        for one in views:
            for name, value in self.algorithm.totals(one, self.learner).items():
                sums[name] = sums.get(name, 0.0) + value
        return replace(view, totals=sums)


def part(view: ClaimView, rows: Int64) -> ClaimView:
    """The episodes `rows` of a view, in that order, as a view of their own."""
    tokens = _tokens(view, rows)
    return replace(
        view,
        rewards=view.rewards[rows],
        components={name: values[rows] for name, values in view.components.items()},
        correct=view.correct[rows],
        groups=view.groups[rows],
        prompt_ids=tuple(view.prompt_ids[row] for row in rows),
        cu_seqlens=np.concatenate([[0], np.cumsum(view.lengths[rows])]).astype(np.int64),
        per_token={name: values[tokens] for name, values in view.per_token.items()},
    )


def _tokens(view: ClaimView, rows: Int64) -> Int64:
    pieces = [np.arange(view.cu_seqlens[row], view.cu_seqlens[row + 1]) for row in rows]
    return np.concatenate([np.zeros(0, np.int64), *pieces])


def _trained(count: int) -> Any:
    return np.arange(count) % 4 != 3


def _finite(trial: Trial) -> None:
    trial.credit(trial.view())
    for sizes in ((1,), (3,), ()):
        trial.credit(trial.view(sizes=sizes))
    trial.credit(trial.view(iteration=1000))


def _repeatable(trial: Trial) -> None:
    state = trial.state()
    before = json.dumps(state)
    first, again = trial.credit(trial.view(), state), trial.credit(trial.view(), json.loads(before))
    assert json.dumps(state) == before, "the given state was changed: answer a new one in Credit.state"
    for name in ("values", "weights", "token_weights"):
        one, other = getattr(first, name), getattr(again, name)
        assert (one is None) == (other is None) and (one is None or np.array_equal(one, other)), f"{name} differ"
    assert json.dumps(first.state) == json.dumps(again.state), "the next states differ"


def _rank_count(trial: Trial) -> None:
    algorithm, view = trial.algorithm, trial.view()
    if algorithm.claim_wide or algorithm.state is not None:
        return
    whole, parts = trial.credit(view), [trial.credit(own) for own in trial.parts(view)]
    for name in ("values", "weights", "token_weights"):
        one = getattr(whole, name)
        if one is not None:
            worst = np.abs(one - np.concatenate([getattr(own, name) for own in parts])).max(initial=0.0)
            assert worst <= TOLERANCE, (
                f"credit.{name} of a group changes by {worst:g} with the groups beside it: declare "
                "Algorithm(totals=...) for statistics of the claim, or claim_wide=True"
            )


def _split(trial: Trial) -> None:
    view = trial.view()
    credit, random = trial.credit(view), np.random.default_rng(1)
    logprobs = torch.from_numpy(-random.random(int(view.cu_seqlens[-1])) - 0.1)
    order = random.permutation(view.num_episodes)
    whole, units, _ = trial.gradient(view, credit, np.arange(view.num_episodes), logprobs)
    found = torch.zeros_like(whole)
    for rows in (order[:3], order[3:4], order[4:]):
        gradient, own, _ = trial.gradient(view, credit, rows, logprobs)
        found[_tokens(view, rows)] = gradient * own / units
    worst = float((found - whole).abs().max())
    assert worst <= TOLERANCE, f"the gradient changes by {worst:g} with the split into micro-batches, or their order"


def _masked(trial: Trial) -> None:
    view = trial.view()
    credit = trial.credit(view)
    logprobs = torch.full((int(view.cu_seqlens[-1]),), -1.0, dtype=torch.float64)
    for poison in (-torch.inf, torch.nan):
        spoilt = torch.where(torch.from_numpy(_trained(len(logprobs))), logprobs, torch.tensor(poison).double())
        gradient, _, trained = trial.gradient(view, credit, np.arange(view.num_episodes), spoilt, scope=False)
        assert torch.isfinite(gradient).all(), f"{poison} at tokens without a gradient spoils that of others"
        assert (gradient[~trained] == 0).all(), "tokens that are not trained have a gradient"
        nothing = replace(credit, values=credit.values * 0)
        assert torch.isfinite(trial.gradient(view, nothing, np.arange(1), spoilt, scope=False)[0]).all()


CASES: Mapping[str, Callable[[Trial], None]] = {
    "credit is finite, for a group alone, one of equal rewards and none at all": _finite,
    "the same claim and state give the same credit and state, bit for bit": _repeatable,
    "ranks that see other groups give the same credit": _rank_count,
    "the split into micro-batches and their order change no gradient": _split,
    "-inf and NaN behind trained = False are harmless": _masked,
}
"""Each rule, and what tries it; an AssertionError says what was seen."""
