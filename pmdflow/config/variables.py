"""`${NAME}` in the arguments of rewards and environments: a variable of the process that uses it.

A configuration keeps the name. Its value is never in a `Config`, so it is in no file, page or message that shows one.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote, quote_plus

VARIABLE = re.compile(r"\$\{([A-Za-z_]\w*)\}")


def variables(value: Any) -> Iterator[str]:
    """Names of all variables in a value, however deep."""
    if isinstance(value, str):
        yield from VARIABLE.findall(value)
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from variables(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from variables(inner)


def resolve(value: Any) -> Any:
    """The value with every variable looked up; to be used at once and kept nowhere.

    Raises:
        ValueError: one is not set.

    Example:
        >>> os.environ["EXAMPLE"] = "x"
        >>> resolve({"key": ["${EXAMPLE}-1"]})
        {'key': ['x-1']}
    """
    if isinstance(value, str):
        return VARIABLE.sub(lambda match: _value(match[1]), value)
    if isinstance(value, Mapping):
        return {key: resolve(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [resolve(inner) for inner in value]
    return value


def hide(text: str, value: Any) -> str:
    """`text` with the names of the variables in `value` where their values stand: errors may quote an argument.

    Values are found as they are, and as Python, JSON and addresses write them.
    """
    for name in variables(value):
        if found := os.environ.get(name):
            urls = (quote(found, safe, errors="surrogateescape") for safe in ("/", ""))
            plus = quote_plus(found, errors="surrogateescape")
            forms = {found, repr(found)[1:-1], json.dumps(found)[1:-1], *urls, plus}
            for form in sorted(forms, key=len, reverse=True):
                text = text.replace(form, f"${{{name}}}")
    return text


def _value(name: str) -> str:
    try:
        return os.environ[name]
    except KeyError:
        raise ValueError(f"the environment variable {name} is not set here; set it before the run starts") from None
