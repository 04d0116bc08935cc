"""Finite data: columns, a split that never leaks, epochs, long prompts; the same from .jsonl and .parquet."""

from __future__ import annotations

import datetime
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmdflow.data.jsonl import JsonlRows
from pmdflow.data.messages import prompt_key
from pmdflow.data.parquet import ParquetRows
from pmdflow.data.prompts import make_prompts, read_prompts
from pmdflow.data.rows import Rows
from pmdflow.data.table import TablePrompts
from pmdflow.data.tokenizer import make_tokenize
from pmdflow.errors import PmdflowError
from tests.support.data import CHAT_TEMPLATE, make_config, same, save_tokenizer, write_jsonl, write_parquet


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tokenizer(tmp_path_factory.mktemp("model"), chat_template=CHAT_TEMPLATE)


def questions(n: int) -> list[dict[str, Any]]:
    return [{"question": f"what is {i} + {i}?", "solution": str(2 * i), "level": i % 5} for i in range(n)]


def test_parquet_and_jsonl_of_the_same_rows_are_the_same_prompts(model: str, tmp_path: Path) -> None:
    rows = questions(50)
    tasks = [
        write_jsonl(tmp_path / "maths.jsonl", rows),
        write_parquet(tmp_path / "maths.parquet", rows, row_group_size=7),
    ]
    columns = {"prompt": "question", "answer": "solution"}
    first, second = (make_prompts(make_config(model, task, held_out=5, columns=columns)) for task in tasks)
    assert all(same(first.prompt(cursor), second.prompt(cursor)) for cursor in range(100))
    assert all(map(same, first.held_out(5), second.held_out(5)))
    prompt = first.prompt(0)
    number = int(prompt.id.removeprefix("maths-")) - 1
    assert prompt.metadata == {"answer": rows[number]["solution"], "level": rows[number]["level"]}
    assert prompt.text == rows[number]["question"]


def test_a_dotted_column_reaches_inside_and_metadata_can_be_chosen(model: str, tmp_path: Path) -> None:
    row = {
        "prompt": [{"role": "user", "content": "2 + 2?"}],
        "reward_model": {"ground_truth": "4", "style": "rule"},
        "when": datetime.date(2026, 1, 1),
        "kind": "sum",
    }
    task = write_parquet(tmp_path / "set.parquet", [row] * 2)
    answer = {"answer": "reward_model.ground_truth"}
    with pytest.raises(ValueError, match=r"set\.parquet:1: cannot be stored.*data\.columns\.metadata"):
        make_prompts(make_config(model, task, held_out=0, columns=answer))
    columns = {**answer, "metadata": ["kind"]}
    prompt = make_prompts(make_config(model, task, held_out=0, columns=columns)).prompt(0)
    assert prompt.metadata == {"answer": "4", "kind": "sum", "messages": row["prompt"]}
    for wrong in ("nothing", "reward_model.nothing"):
        with pytest.raises(ValueError, match=rf"set\.parquet:1: there is no column {wrong}: it has .*kind"):
            make_prompts(make_config(model, task, held_out=0, columns={**columns, "answer": wrong}))


def test_a_messages_column_is_found_by_itself(model: str, tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    task = write_jsonl(tmp_path / "chats.jsonl", [{"messages": messages, "tools": [], "answer": 1}])
    prompt = make_prompts(make_config(model, task, held_out=0)).prompt(0)
    assert (prompt.text, prompt.metadata) == ("u", {"answer": 1, "messages": messages})
    assert len(prompt.tokens) == len("<system>s<user>u<assistant>")


@given(
    texts=st.lists(st.sampled_from([f"q {i}" for i in range(12)]), min_size=4, max_size=40),
    held_out=st.integers(0, 6),
    seed=st.integers(0, 3),
    as_chat=st.lists(st.booleans(), min_size=40, max_size=40),
    spaced=st.lists(st.booleans(), min_size=40, max_size=40),
)
def test_no_epoch_ever_asks_what_is_held_out(
    model: str,
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str],
    held_out: int,
    seed: int,
    as_chat: list[bool],
    spaced: list[bool],
) -> None:
    """Repeats of held-out prompts are left out as texts, with other white space and as messages alike."""
    written = [text.replace(" ", "\n ") if space else text for text, space in zip(texts, spaced, strict=False)]
    rows = [
        {"prompt": [{"role": "user", "content": text}] if chat else text}
        for text, chat in zip(written, as_chat, strict=False)
    ]
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_jsonl(path, rows)
    held = set(texts[max(len(texts) - held_out, 0) :]) if held_out else set()
    trained = [text for text in texts[: max(len(texts) - held_out, 0)] if text not in held]
    make = {"rows": JsonlRows([path]), "name": "rows", "tokenize": make_tokenize(model), "seed": seed}
    if not trained:
        with pytest.raises(ValueError, match=r"none is left.*lower eval\.prompts"):
            TablePrompts(**make, num_held_out=held_out).prompt(0)
        return
    source = TablePrompts(**make, num_held_out=held_out)
    for epoch in range(2):
        drawn = [source.prompt(epoch * len(trained) + i) for i in range(len(trained))]
        assert sorted(" ".join(prompt.text.split()) for prompt in drawn) == sorted(trained)
        assert len({prompt.id for prompt in drawn}) == len(trained)


def test_the_order_of_an_epoch_is_that_of_runs_begun_earlier(model: str, tmp_path: Path) -> None:
    task = write_jsonl(tmp_path / "old.jsonl", [{"prompt": f"q {i}"} for i in range(30)])
    source = make_prompts(make_config(model, task, held_out=2, seed=7))
    for epoch in (0, 1, 5):
        order = list(range(28))
        random.Random(f"pmdflow-epoch-7-{epoch}").shuffle(order)
        assert [source.prompt(28 * epoch + i).id for i in range(28)] == [f"old-{row + 1}" for row in order]


def test_long_prompts_are_refused_by_name_or_left_out_and_counted(model: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i:02}" + "x" * (40 if i % 10 == 3 else 5)} for i in range(30)]
    rows[13]["prompt"] += "longest"
    task = write_parquet(tmp_path / "long.parquet", rows)
    with pytest.raises(ValueError, match=r"3 of 30 prompts are longer.*long\.parquet:14, has 66.*skip_long_prompts"):
        make_prompts(make_config(model, task, held_out=2, max_prompt_tokens=40))
    said: list[str] = []
    config = make_config(model, task, held_out=7, max_prompt_tokens=40, skip_long_prompts=True)
    source = make_prompts(config, on_skip=said.append)
    (message,) = said
    assert "3 of 30 prompts" in message
    assert "left out" in message
    assert [prompt.id for prompt in source.held_out(7)] == [f"long-{n}" for n in (23, 25, 26, 27, 28, 29, 30)]
    assert {source.prompt(cursor).id for cursor in range(20)} == {f"long-{n}" for n in range(1, 23)} - {
        "long-4",
        "long-14",
    }


def test_rows_of_several_files_are_located_and_numbered(tmp_path: Path) -> None:
    for number in range(3):
        write_jsonl(tmp_path / f"{number}.jsonl", [{"prompt": f"{number} {i}"} for i in range(4)])
        write_parquet(tmp_path / f"{number}.parquet", [{"prompt": f"{number} {i}", f"k{number}": i} for i in range(4)])
    kinds: list[tuple[type[Any], str]] = [(JsonlRows, "jsonl"), (ParquetRows, "parquet")]
    for kind, suffix in kinds:
        rows: Rows = kind([tmp_path / f"{number}.{suffix}" for number in range(3)])
        assert [row["prompt"] for row in rows] == [f"{n} {i}" for n in range(3) for i in range(4)]
        assert [rows[index]["prompt"] for index in (0, 5, 11)] == ["0 0", "1 1", "2 3"]
        assert rows.where(5) == f"{tmp_path / f'1.{suffix}'}:2"
        assert (rows.number(5), len(rows)) == (6, 12)


@pytest.mark.parametrize("name", ["broken.jsonl", "broken.parquet"])
def test_files_that_are_no_text_or_no_parquet_are_refused_by_name(model: str, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b'{"prompt": "\xff\xfe"}\n')
    with pytest.raises(ValueError, match=name):
        make_prompts(make_config(model, str(tmp_path / name), held_out=0))


def test_a_byte_order_mark_is_no_part_of_the_first_line(model: str, tmp_path: Path) -> None:
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps({"prompt": "é"}).encode() + b"\r\n\r\n")
    assert [prompt.text for prompt in read_prompts(make_config(model, str(tmp_path / "bom.jsonl")))] == ["é"]


def test_what_a_table_is_changes_with_its_content_and_not_with_its_place(model: str, tmp_path: Path) -> None:
    def identity(folder: str, rows: list[Any]) -> dict[str, Any]:
        (tmp_path / folder).mkdir()
        task = write_jsonl(tmp_path / folder / "same.jsonl", rows)
        return make_prompts(make_config(model, task, held_out=0)).identity

    rows = [{"prompt": f"q {i}", "answer": i} for i in range(5)]
    first = identity("a", rows)
    assert first["same"]["rows"] == 5
    assert identity("b", rows) == first
    assert identity("c", [*rows[:4], {"prompt": "q 4", "answer": 5}]) != first


def test_keys_do_not_collide_in_a_large_set() -> None:
    assert len({prompt_key(f"what is {i} + {j}?") for i in range(300) for j in range(300)}) == 90_000


def test_a_file_that_is_rewritten_while_a_run_reads_it_gives_no_other_row(model: str, tmp_path: Path) -> None:
    path = tmp_path / "edited.jsonl"
    task = write_jsonl(path, [{"prompt": f"q {i}"} for i in range(20)])
    prompts = make_prompts(make_config(model, task, held_out=2))
    before = [prompts.prompt(cursor) for cursor in range(18)]
    path.touch()
    assert all(map(same, before, map(prompts.prompt, range(18))))
    for rows in ([{"prompt": f"Q {i}"} for i in range(20)], [{"prompt": f"longer {i}"} for i in range(30)]):
        write_jsonl(path, rows)
        with pytest.raises(PmdflowError, match=r"edited\.jsonl has changed while the run reads it"):
            prompts.prompt(3)
    write_jsonl(path, [{"prompt": f"q {i}"} for i in range(20)])
    assert all(map(same, before, map(prompts.prompt, range(18))))


ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}{% endfor %}"
)


def test_messages_that_the_template_refuses_are_found_before_the_start(tmp_path: Path) -> None:
    model = save_tokenizer(tmp_path / "alternating", chat_template=ALTERNATING)
    rows = [{"messages": [{"role": "user", "content": f"q {i}"}]} for i in range(30)]
    rows[12]["messages"].append({"role": "user", "content": "and another"})
    with pytest.raises(ValueError, match=r"chats\.jsonl:13: .*its chat template fails.*roles must alternate"):
        make_prompts(make_config(model, write_jsonl(tmp_path / "chats.jsonl", rows), held_out=2))
