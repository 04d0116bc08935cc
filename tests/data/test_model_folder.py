"""A model folder that cannot be trained is refused by what its files say, before torch is imported."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pmdflow.config.sources import DataConfig
from pmdflow.data.fingerprint import fingerprint
from pmdflow.data.inputs import resolve_inputs
from pmdflow.data.model_folder import check_folder
from tests.support.data import make_config
from tests.support.paths import TINY

DATA = DataConfig(task="reasoning_gym/gcd", max_tokens=500, max_prompt_tokens=500)


def change(path: Path, **values: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    settings = json.loads(path.read_text()) if path.is_file() else {}
    merged = {**settings, **values}
    path.write_text(json.dumps({key: value for key, value in merged.items() if value is not None}))


def shard(folder: Path) -> None:
    """The one weights file as the second of two shards."""
    (folder / "model.safetensors").rename(folder / "model-00002-of-00002.safetensors")
    weight_map = {
        "model.norm.weight": "model-00002-of-00002.safetensors",
        "lm_head.weight": "model-00001-of-00002.safetensors",
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))  # fmt: skip


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "model"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "config.json").unlink(), r"model\.path: .*no config\.json"),
        (lambda f: cut(f / "config.json"), r"config\.json cannot be read: .*fetch it again"),
        (lambda f: (f / "config.json").write_text("[]"), r"config\.json holds a list"),
        (lambda f: change(f / "config.json", model_type=None), "names no model_type"),
        (lambda f: change(f / "config.json", quantization_config={"quant_method": "gptq"}), r"quantized \(gptq\)"),
        (lambda f: change(f / "config.json", max_position_embeddings=32), r"has 32 positions, .*sequences of 1,000"),
        (lambda f: change(f / "config.json", vocab_size=300), r"ids up to 315, but the model only embeds 300"),
        (
            lambda f: change(f / "tokenizer_config.json", added_tokens_decoder={"400": {"content": "<new>"}}),
            "ids up to 400, but the model only embeds 316",
        ),
        (lambda f: (f / "tokenizer.json").write_text("{}"), r"tokenizer\.json cannot be read"),
        (lambda f: [(f / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")], "it has no tokenizer"),
        (lambda f: (f / "chat_template.jinja").write_text("a\n{{ b }"), r"chat_template\.jinja, line 2: "),
        (lambda f: change(f / "tokenizer_config.json", chat_template="{% if %}"), r"tokenizer_config\.json, line 1"),
        (
            lambda f: change(f / "generation_config.json", eos_token_id="1"),
            r"generation_config\.json: eos_token_id is '1'",
        ),
        (lambda f: cut(f / "generation_config.json"), r"generation_config\.json cannot be read"),
        (lambda f: (f / "model.safetensors").unlink(), "it has no weights"),
        (lambda f: cut(f / "model.safetensors"), r"model\.safetensors has [\d,]+ bytes of [\d,]+: it is not whole"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x05"), r"model\.safetensors has 1 bytes of"),
        (shard, r"names model-00001-of-00002\.safetensors, which is missing"),
    ],
)
def test_a_spoilt_folder_is_refused_by_name(folder: Path, spoil: Callable[[Path], None], message: str) -> None:
    check_folder(folder, DATA)
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        check_folder(folder, DATA)


def test_every_reason_is_said_at_once(folder: Path) -> None:
    change(folder / "config.json", vocab_size=300, max_position_embeddings=32)
    cut(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"(?s)32 positions.*ids up to 315.*not whole") as refused:
        check_folder(folder, DATA)
    assert str(refused.value).count(f"model.path is '{folder}': ") == 3


def test_an_index_that_places_a_tensor_in_a_file_without_it_is_refused(folder: Path) -> None:
    shard(folder)
    shutil.copy(folder / "model-00002-of-00002.safetensors", folder / "model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match=r"model-00001-of-00002\.safetensors lacks 1 tensors.*lm_head\.weight"):
        check_folder(folder, DATA)


def test_templates_with_the_tags_of_transformers_are_right(folder: Path) -> None:
    text = "{% for m in messages %}{% generation %}{{ m.content }}{%- endgeneration -%}{% break %}{% endfor %}"
    (folder / "chat_template.jinja").write_text(text)
    check_folder(folder, DATA)


def test_a_prompt_limit_that_nobody_chose_is_what_the_positions_leave(folder: Path, tmp_path: Path) -> None:
    change(folder / "config.json", max_position_embeddings=100)
    config = make_config(str(folder), "reasoning_gym/gcd")
    assert resolve_inputs(config, merged=tmp_path).config.data.max_prompt_tokens == 84
    chosen = make_config(str(folder), "reasoning_gym/gcd", max_prompt_tokens=85)
    with pytest.raises(ValueError, match=r"has 100 positions, but data\.max_prompt_tokens \(85\)"):
        resolve_inputs(chosen, merged=tmp_path)


def test_a_folder_is_known_by_its_content(folder: Path, tmp_path: Path) -> None:
    before = fingerprint(folder)
    assert fingerprint(Path(shutil.copytree(folder, tmp_path / "elsewhere"))) == before
    change(folder / "generation_config.json", eos_token_id=2)
    (folder / "adapter_model.bin").write_bytes(b"weights of an older form")
    assert {name for name, digest in fingerprint(folder).items() if digest != before.get(name)} == {
        "generation_config.json",
        "adapter_model.bin (samples)",
    }


def test_the_check_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from pathlib import Path; from pmdflow.config.load import load\n"
        "from pmdflow.data.inputs import resolve_inputs\n"
        "resolve_inputs(load('configs/quickstart.yaml').config, merged=Path('never'))\n"
        "print([name for name in ('torch', 'transformers', 'ray', 'pyarrow') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "[]"
