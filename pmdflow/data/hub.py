"""The Hugging Face Hub: models and data sets by id, through its own client, its cache and its environment.

`HF_HOME`, `HF_TOKEN`, `HF_ENDPOINT` and `HF_HUB_OFFLINE` mean what they mean to every program of Hugging Face. A
download that was cut goes on where it was: within a file while the process lives, file by file after it died.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Literal

from pmdflow.data.hub_files import choose_files

ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>\S+))?")
SMALL = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
"""What is read of a model before its weights are downloaded."""
IGNORED = ["*/*", "consolidated*"]
"""Copies of the weights in other formats lie in subfolders, or under this name."""
Kind = Literal["model", "dataset"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HubId:
    """A repository at one commit."""

    name: str
    """`org/name`."""
    commit: str
    """40 hexadecimal digits."""
    kind: Kind

    def __str__(self) -> str:
        """`org/name@commit`, which names the same for ever."""
        return f"{self.name}@{self.commit}"


def resolve(text: str, *, kind: Kind, key: str) -> HubId:
    """The commit that `org/name` or `org/name@revision` names; what the cache knows, where the Hub cannot be asked.

    Args:
        text: The id.
        kind: Of what.
        key: The setting that an error names.

    Raises:
        ValueError: no such id or revision, no access, or no answer and nothing in the cache; one line with the remedy.
    """
    from huggingface_hub import HfApi

    match = ID.fullmatch(text)
    assert match, text
    with _explained(text, kind=kind, key=key):
        found = HfApi().resolve_revision(match["name"], repo_type=kind, revision=match["revision"])
    return HubId(name=match["name"], commit=found.resolved, kind=kind)


def fetch_model(model: HubId, *, weights: bool) -> Path:
    """The folder of a model, in the cache: its small files, and if asked its weights.

    Raises:
        ValueError: as `resolve`.
    """
    folder = _fetch(model, SMALL, key="model.path")
    if weights:
        _fetch(model, [*SMALL, "*.safetensors"], key="model.path")
        if not any(folder.glob("*.safetensors")):
            _fetch(model, [*SMALL, "pytorch_model*.bin", "adapter_model.bin"], key="model.path")
    return folder


def fetch_dataset(text: str, *, config: str | None, split: str, key: str = "data.task") -> list[Path]:
    """The `.parquet` or `.jsonl` files of one split of a data set, in the cache.

    Raises:
        ValueError: as `resolve`, or there is no such configuration or split.
    """
    from huggingface_hub import get_cached_repo_tree

    dataset = resolve(text, kind="dataset", key=key)
    folder = _fetch(dataset, ["README.md"], key=key)
    tree = get_cached_repo_tree(dataset.name, repo_type="dataset", revision=dataset.commit)
    card = folder / "README.md"
    try:
        chosen = choose_files(
            [file.path for file in tree],
            card=card.read_text(encoding="utf-8") if card.is_file() else "",
            config=config,
            split=split,
        )
    except ValueError as error:
        raise ValueError(f"{key} is hf:{text}: {error}") from error
    _fetch(dataset, [escape(name) for name in chosen], key=key)
    return [folder / name for name in chosen]


def _fetch(repository: HubId, patterns: Sequence[str], *, key: str) -> Path:
    from huggingface_hub import snapshot_download

    with _explained(str(repository), kind=repository.kind, key=key):
        return Path(
            snapshot_download(
                repository.name,
                repo_type=repository.kind,
                revision=repository.commit,
                allow_patterns=list(patterns),
                ignore_patterns=IGNORED if repository.kind == "model" else None,
            )
        )


@contextmanager
def _explained(text: str, *, kind: Kind, key: str) -> Iterator[None]:
    """Turn what the client raises into one line that names the setting and the remedy."""
    from huggingface_hub import constants, errors

    endpoint, cache = constants.ENDPOINT, constants.HF_HUB_CACHE
    what = "model" if kind == "model" else "data set"
    also = "there is no such folder, and " if kind == "model" else ""
    try:
        yield
    except errors.GatedRepoError as error:
        raise ValueError(
            f"{key} is {text!r}, a gated {what}: ask for access on its page at {endpoint}, then set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"{key} is {text!r}: {also}the Hub at {endpoint} knows no such {what}; mend the name, or, if it is private,"
            " set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(
            f"{key} is {text!r}: the {what} has no such revision; name a branch, a tag or a commit behind the @"
        ) from error
    except (errors.RevisionResolutionError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        offline = constants.HF_HUB_OFFLINE
        cause, remedy = ("HF_HUB_OFFLINE is set", "unset it") if offline else (_first_cause(error), "mend the network")
        raise ValueError(
            f"{key} is {text!r}: {also}the {what} is not whole in {cache}, and the Hub at {endpoint} cannot be asked "
            f"({cause}); {remedy}, or give {'a folder' if kind == 'model' else 'files'} of this machine"
        ) from error
    except Exception as error:  # of the client, of its HTTP library, or of the disk
        raise ValueError(
            f"{key} is {text!r}: downloading the {what} from {endpoint} failed: {_first_cause(error)}; run the same "
            "command again, files that are whole are kept"
        ) from error


def _first_cause(error: BaseException) -> str:
    """The first line of what began it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]
