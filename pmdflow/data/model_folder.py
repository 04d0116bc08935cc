"""What the files of a model folder say, without loading it: whether it can be trained, in the first second."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmdflow.config.model_size import read_header

if TYPE_CHECKING:
    from pmdflow.config.sources import DataConfig

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tokenizer_config.json")
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
"""Names that model families have for the longest sequence."""
_GENERATION_TAGS = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
"""Tags that transformers adds to Jinja."""


def check_folder(folder: Path, data: DataConfig, *, weights: bool = True) -> None:
    """Refuse a folder that cannot be trained.

    Args:
        folder: The folder.
        data: Says how long sequences become.
        weights: Its weights should be there.

    Raises:
        ValueError: every reason, one a line.
    """
    config = read_config(folder)
    problems = [
        *_config_problems(config),
        *_position_problems(config, data),
        *_tokenizer_problems(folder, config),
        *_template_problems(folder),
        *_end_problems(folder),
        *(weight_problems(folder) if weights else ()),
    ]
    if problems:
        raise ValueError("\n".join(f"model.path is {str(folder)!r}: {problem}" for problem in problems))


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
        ValueError: there is none, or it is torn.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"model.path: {folder} is no Hugging Face model folder (it has no config.json)")
    return read_json(path)


def num_positions(config: dict[str, Any]) -> int | None:
    """The longest sequence that the model was made for; None is unlimited or unknown."""
    text = config.get("text_config") or config
    return next((int(text[name]) for name in POSITIONS if text.get(name)), None)


def eos_ids(folder: Path) -> set[int]:
    """Every `eos_token_id` of config.json and generation_config.json, for the model or for the text model in it.

    Raises:
        ValueError: a file is torn, or names something else than a token id or a list of them.
    """
    found: set[int] = set()
    for path in filter(Path.is_file, (folder / "config.json", folder / "generation_config.json")):
        values = read_json(path)
        for section in (values, values.get("text_config") or {}):
            named = section.get("eos_token_id")
            ids = named if isinstance(named, list) else [] if named is None else [named]
            if any(type(id) is not int for id in ids):
                raise ValueError(
                    f"{path}: eos_token_id is {named!r:.80}, not a token id or a list of them; mend it there"
                )
            found.update(ids)
    return found


def read_json(path: Path) -> dict[str, Any]:
    """One JSON file of a model folder.

    Raises:
        ValueError: it is torn, or holds something else than an object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}; fetch it again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, not an object; fetch it again")
    return values


def _config_problems(config: dict[str, Any]) -> Iterator[str]:
    quantized = config.get("quantization_config")
    if quantized:
        yield (
            f"its weights are quantized ({quantized.get('quant_method', 'unknown')}), which cannot be trained; give "
            "the model that it was made from"
        )
    if "model_type" not in config:
        yield "config.json names no model_type; fetch it again"


def _position_problems(config: dict[str, Any], data: DataConfig) -> Iterator[str]:
    positions = num_positions(config)
    longest = data.max_prompt_tokens + data.max_tokens
    if positions is not None and longest > positions:
        yield (
            f"it has {positions:,} positions, but data.max_prompt_tokens ({data.max_prompt_tokens:,}) and "
            f"data.max_tokens ({data.max_tokens:,}) make sequences of {longest:,}; lower one of them"
        )


def _tokenizer_problems(folder: Path, config: dict[str, Any]) -> Iterator[str]:
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        yield "it has no tokenizer; copy the files of its model there (tokenizer.json, tokenizer_config.json)"
    file = folder / "tokenizer.json"
    rows = (config.get("text_config") or config).get("vocab_size")
    if not file.is_file() or not rows:
        return
    from tokenizers import Tokenizer

    added = folder / "tokenizer_config.json"
    decoder = read_json(added).get("added_tokens_decoder", {}) if added.is_file() else {}
    try:
        highest = max([*Tokenizer.from_file(str(file)).get_vocab().values(), *map(int, decoder)], default=-1)
    except Exception as error:  # the library raises nothing more specific
        yield f"{file.name} cannot be read: {error}; fetch it again"
        return
    if highest >= rows:
        yield (
            f"its tokenizer has ids up to {highest:,}, but the model only embeds {rows:,} (vocab_size of config.json); "
            "give the tokenizer that it was trained with, or enlarge the embedding"
        )


def _template_problems(folder: Path) -> Iterator[str]:
    from jinja2 import Environment, TemplateSyntaxError

    for name, template in _templates(folder):
        try:
            Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=False).parse(  # noqa: S701 (parsed only)
                _GENERATION_TAGS.sub("", template)
            )
        except TemplateSyntaxError as error:
            yield f"its chat template, {name}, line {error.lineno}: {error.message}; mend the template"


def _end_problems(folder: Path) -> Iterator[str]:
    try:
        eos_ids(folder)
    except ValueError as error:
        yield str(error)


def _templates(folder: Path) -> Iterator[tuple[str, str]]:
    path = folder / "chat_template.jinja"
    if path.is_file():
        yield path.name, path.read_text(encoding="utf-8")
    settings = folder / "tokenizer_config.json"
    given = read_json(settings).get("chat_template") if settings.is_file() else None
    for template in given if isinstance(given, list) else [{"template": given}] if given else []:
        yield settings.name, str(template["template"])


def weight_problems(folder: Path) -> Iterator[str]:
    """What is missing or torn among the weights' files, by their index and their headers."""
    safetensors = (folder / "model.safetensors.index.json").is_file() or any(folder.glob("*.safetensors"))
    index = folder / ("model.safetensors.index.json" if safetensors else "pytorch_model.bin.index.json")
    expected: dict[str, set[str]] = {}
    if index.is_file():
        for tensor, name in read_json(index)["weight_map"].items():
            expected.setdefault(name, set()).add(tensor)
    else:
        pattern = "*.safetensors" if safetensors else "pytorch_model.bin"
        expected = {path.name: set() for path in folder.glob(pattern)}
    if not expected:
        yield "it has no weights (*.safetensors or pytorch_model.bin); fetch them"
    for name, tensors in sorted(expected.items()):
        if not (folder / name).is_file():
            yield f"{index.name} names {name}, which is missing; fetch it"
            continue
        try:
            held = read_header(folder / name).keys() if safetensors else tensors
        except ValueError as error:
            yield str(error)
            continue
        if absent := sorted(tensors - held):
            yield f"{name} lacks {len(absent)} tensors that {index.name} places there, such as {absent[0]}; fetch it"
