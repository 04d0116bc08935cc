"""Try import paths in a process of its own: `python -m pmdflow.config.try_import '[["math:sqrt", true]]'`.

Prints a line of JSON for each path as soon as it is known: [what is wrong, remedy], or [null, null]. Whoever started it
knows by the lines that are missing which import has hung or has ended the process.
"""

from __future__ import annotations

import json
import os
import pkgutil
import sys
import traceback
from difflib import get_close_matches

from pmdflow.config.imports import load_module, parts, shown

Finding = tuple[str | None, str | None]
"""What is wrong with an import path, and the remedy; both None if nothing is."""


def try_import(path: str, *, called: bool) -> Finding:
    """Import `package.module:name` and look `name` up; `called` says that it must be callable.

    Example:
        >>> try_import("math:sqr", called=True)
        ('the module `math` has no `sqr`', 'did you mean `sqrt`?')
    """
    _, module_name, name = parts(path)
    try:
        module = load_module(path)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            return f"there is no module `{error.name}`", _similar_module(error.name)
        return f"`{module_name}` cannot be imported: {error}", f"install `{error.name}`, which {_place(error)} imports"
    except (Exception, SystemExit) as error:
        said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return f"`{module_name}` cannot be imported: {said}", f"look at {_place(error)}"
    if not hasattr(module, name):
        near = get_close_matches(name, vars(module), n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"its file is {getattr(module, '__file__', None)}"
        return f"the module `{module_name}` has no `{name}`", hint
    if called and not callable(getattr(module, name)):
        return f"`{shown(path)}` is a {type(getattr(module, name)).__name__}", "name a function or a class"
    return None, None


def _similar_module(missing: str) -> str:
    parent, _, name = missing.rpartition(".")
    found = getattr(sys.modules.get(parent), "__path__", []) if parent else None
    near = get_close_matches(name, [module.name for module in pkgutil.iter_modules(found)], n=1)
    if near:
        return f"did you mean `{parent}.{near[0]}`?" if parent else f"did you mean `{near[0]}`?"
    return f"modules are looked for in {os.getcwd()}, beside the configuration file and among the installed packages"


def _place(error: BaseException) -> str:
    """Where a module's own code failed: `file:line`."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen importlib")]
    return f"{frames[-1].filename}:{frames[-1].lineno}"


def main() -> None:
    """Try what the command line lists; what the modules print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for path, called in json.loads(sys.argv[1]):
        answers.write(json.dumps(try_import(path, called=called)) + "\n")
    os._exit(0)  # threads and exit handlers that a module has left behind are of no interest


if __name__ == "__main__":
    main()
