"""What is durable of an episode, as turns."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pmdflow.agents.record import Episode, Record

PROMPT = (9,)


def episode(*pieces: tuple[str, str], forks: tuple[tuple[int, int], ...] = ()) -> Episode:
    """Pieces of (`o` observed or `g` generated, its tokens as letters)."""
    tokens = [ord(letter) for _, letters in pieces for letter in letters]
    observed = [kind == "o" for kind, letters in pieces for _ in letters]
    return Episode(
        tokens=tokens, observed=observed, logprobs=[0.0] * len(tokens), versions=[0] * len(tokens), forks=forks
    )


def after(letters: str) -> tuple[int, ...]:
    return (*PROMPT, *map(ord, letters))


def test_each_turn_follows_its_history_once() -> None:
    record = Record.of(PROMPT, episode(("o", "ab"), ("g", "cd"), ("o", "e"), ("g", "f")))
    assert record.live == after("abcdef")
    first = record.take(after("ab"))
    assert first is not None
    assert (first.tokens, first.last) == (after("cd")[1:], False)
    assert record.take(after("ab")) is None
    second = record.take(after("abcde"))
    assert second is not None
    assert second.last
    assert record.remaining == 0


def test_samples_of_one_request_come_in_their_order() -> None:
    record = Record.of(PROMPT, episode(("o", "ab"), ("g", "cd"), ("g", "xy"), forks=((4, 2),)))
    assert record.live == after("abxy")
    taken = [record.take(after("ab")) for _ in range(2)]
    assert [turn.tokens for turn in taken if turn] == [after("cd")[1:], after("xy")[1:]]


def test_a_fork_of_which_nothing_came_yet_is_the_newest_branch() -> None:
    assert Record.of(PROMPT, episode(("o", "ab"), ("g", "cd"), forks=((4, 1),))).live == after("a")


@given(st.lists(st.tuples(st.text("abc", min_size=1, max_size=3), st.text("xyz", min_size=1, max_size=3)), max_size=6))
def test_a_program_that_asks_the_same_is_answered_the_same(turns: list[tuple[str, str]]) -> None:
    pieces = [piece for question, answer in turns for piece in (("o", question), ("g", answer))]
    record, history = Record.of(PROMPT, episode(*pieces)), ""
    for question, answer in turns:
        history += question
        turn = record.take(after(history))
        assert turn is not None
        assert turn.tokens == after(answer)[1:]
        history += answer
    assert record.remaining == 0
