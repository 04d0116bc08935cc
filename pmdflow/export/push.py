"""An exported folder on the Hub, through huggingface_hub and the environment that it reads."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path

import httpx2
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

from pmdflow.data.folder_files import TOKENIZER_FILES
from pmdflow.errors import PmdflowError

MODEL_FILES = (
    "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "adapter_*", "config.json",
    "generation_config.json", *TOKENIZER_FILES,
)  # fmt: skip
"""What a model is loaded from: what an earlier one left of it would be loaded with the new one, or instead."""


def require_account(repository: str) -> None:
    """Refuse an id or a token that the Hub does not take, before anything is written.

    Raises:
        PmdflowError: says what to mend.
    """
    with _named(repository):
        api = HfApi()
        api.whoami()
        api.repo_exists(repository)


def push(folder: Path, repository: str, *, message: str) -> str:
    """Upload a folder in one commit to the model `repository`, which is made private where there is none yet.

    `MODEL_FILES` of an earlier model go in the same commit; those in folders of the repository stay.

    Returns:
        The address of the commit.

    Raises:
        PmdflowError: it could not be uploaded; the folder is left as it is, and the hint has the command that goes on.
    """
    api = HfApi()
    with _named(repository, then=f"; then remove {folder} and export again"):
        api.create_repo(repository, private=True, exist_ok=True)
        earlier = [escape(name) for name in api.list_repo_files(repository) if _is_of_model(name)]
    delete = [word for pattern in earlier for word in ("--delete", pattern)]
    command = shlex.join(["hf", "upload", repository, str(folder), ".", "--private", *delete])
    with _named(repository, then=f"; then `{command}` goes on"):
        commit = api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message=message, delete_patterns=earlier
        )
        return str(commit.commit_url)


def _is_of_model(name: str) -> bool:
    return "/" not in name and any(fnmatchcase(name, pattern) for pattern in MODEL_FILES)


@contextmanager
def _named(repository: str, *, then: str = "") -> Iterator[None]:
    try:
        yield
    except HFValidationError as error:
        raise PmdflowError(f"--push {repository}: {_line(error)}", hint="give NAME or ORGANIZATION/NAME") from error
    except LocalTokenNotFoundError as error:
        raise PmdflowError(f"--push {repository}: no token", hint="set HF_TOKEN or run `hf auth login`") from error
    except OfflineModeIsEnabled as error:
        raise PmdflowError(f"--push {repository}: HF_HUB_OFFLINE is set", hint="unset it") from error
    except (HfHubHTTPError, httpx2.HTTPError, OSError, RuntimeError) as error:
        cause = f": {_line(error.__cause__)}" if isinstance(error, RuntimeError) and error.__cause__ else ""
        raise PmdflowError(
            f"--push {repository}: {_line(error)}{cause}",
            hint=f"check HF_ENDPOINT, the network, and that HF_TOKEN may write there{then}",
        ) from error


def _line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
