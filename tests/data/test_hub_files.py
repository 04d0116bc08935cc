"""Which files of a Hub data set are a split: layouts as they are found on the Hub."""

from __future__ import annotations

import pytest

from pmdflow.data.hub_files import choose_files

GSM8K = ["README.md", "main/test-00000-of-00001.parquet", "main/train-00000-of-00001.parquet"]
GSM8K += ["socratic/test-00000-of-00001.parquet", "socratic/train-00000-of-00001.parquet"]
GSM8K_CARD = """---
language: [en]
configs:
- config_name: main
  default: true
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: main/test-*
- config_name: socratic
  data_files:
  - {split: train, path: socratic/train-*}
  - {split: test, path: [socratic/test-*]}
---
# Grade school maths
"""
CONVERTED = ["default/partial-train/0000.parquet", "default/partial-train/0001.parquet", "default/test/0000.parquet"]
FLAT = ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/validation-00000.parquet"]


def card(files: str) -> str:
    """One configuration, which is called a."""
    return f"---\nconfigs:\n- {{config_name: a, {files}}}\n---"


@pytest.mark.parametrize(
    ("names", "card", "config", "split", "expected"),
    [
        (GSM8K, GSM8K_CARD, None, "test", ["main/test-00000-of-00001.parquet"]),
        (GSM8K, GSM8K_CARD, "socratic", "test", ["socratic/test-00000-of-00001.parquet"]),
        (GSM8K, "", "socratic", "train", ["socratic/train-00000-of-00001.parquet"]),
        (FLAT, "---\nlicense: mit\n---\n", None, "train", FLAT[:2]),
        (CONVERTED, "", None, "train", CONVERTED[:2]),
        (CONVERTED, "", "default", "test", CONVERTED[2:]),
        (["train.jsonl", "test.jsonl"], "", None, "test", ["test.jsonl"]),
        (["maths_train.jsonl", "maths-test.jsonl"], "", None, "test", ["maths-test.jsonl"]),
        (["a/x.parquet", "all.csv"], card("data_files: 'a/*'"), None, "train", ["a/x.parquet"]),
        (["d/x.jsonl"], card("data_dir: d, data_files: x.jsonl"), "a", "train", ["d/x.jsonl"]),
    ],
)
def test_the_files_of_a_split(names: list[str], card: str, config: str | None, split: str, expected: list[str]) -> None:
    assert choose_files(names, card=card, config=config, split=split) == expected


@pytest.mark.parametrize(
    ("names", "card", "config", "split", "message"),
    [
        (GSM8K, GSM8K_CARD, None, "validation", r"no split 'validation' among .*set data\.split"),
        (GSM8K, GSM8K_CARD, "hard", "test", "no configuration 'hard'.*one of main, socratic"),
        (GSM8K, "", None, "test", "several configurations; set data.config to one of main, socratic"),
        (GSM8K, "", "hard", "test", "no split 'test'"),
        (["train.csv", "README.md"], "", None, "train", r"no \.parquet or \.jsonl file.*@refs/convert/parquet"),
        (["train.jsonl", "train.parquet"], "", None, "train", "two formats"),
        (["restrain.jsonl", "trainer.jsonl"], "", None, "train", "no split 'train'"),
        (["train.jsonl"], "---\n[unclosed\n---", None, "test", "no split 'test'"),
    ],
)
def test_what_is_not_there_is_refused_with_what_there_is(
    names: list[str], card: str, config: str | None, split: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        choose_files(names, card=card, config=config, split=split)
