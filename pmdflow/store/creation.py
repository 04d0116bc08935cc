"""What the constructor of an actor raises, brought to whoever started it: Ray hands on a traceback as text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

from ray.exceptions import RayActorError

from pmdflow.errors import PmdflowError

_MARK = "the actor was not made: "


@contextmanager
def failures_told() -> Iterator[None]:
    """Whatever a constructor raises becomes an error whose text `failure_of` reads back."""
    try:
        yield
    except (ValueError, PmdflowError) as error:  # they are written for a person
        raise RuntimeError(_MARK + json.dumps(str(error))) from error
    except Exception as error:  # an engine's library can fail in any way
        raise RuntimeError(_MARK + json.dumps(f"{type(error).__name__}: {error}")) from error


def failure_of(error: RayActorError) -> str | None:
    """What the constructor of a dead actor raised; None if its process ended in another way."""
    _, mark, told = str(error).rpartition(_MARK)
    if not mark:
        return None
    message: str = json.JSONDecoder().raw_decode(told)[0]
    return message
