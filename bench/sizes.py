"""Is the house still in order? Sizes, import circles and untyped seams, against the limits of this project.

Files of `pmdflow/` (empty ones left out) and of `rust_buffer/src/` (tests left out); a function is counted from its
first line to its last, docstring included. A circle is one of modules in Python, of rooms (folders, or files beside
them) in Rust; imports for type checking alone are no edges. Prints what breaks a limit, and exits with 1 if anything
does.

    uv run python bench/sizes.py
"""

from __future__ import annotations

import ast
import graphlib
import re
import statistics
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sizes_rust import rust_functions, rust_rooms, rust_source

ROOT = Path(__file__).parents[1]
MOST_LINES = 400
MEDIAN_LINES = 120
P90_LINES = 250
MOST_FUNCTION_LINES = 60
LONG_FUNCTION_LINES = 40
MOST_LONG_FUNCTIONS = 0.01
MOST_UNTYPED = 10.0
"""Lines in 1,000 with `Any`, `cast` or `type: ignore`."""
SEAMS = ("pmdflow/run", "pmdflow/store/client.py")
"""Where actors and store are called: what is untyped here hides bugs."""
_UNTYPED = re.compile(r"\bAny\b|\bcast\(|# type: ignore")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Lines of the files and functions of one language."""

    language: str
    files: Mapping[str, int]
    functions: Mapping[str, int]
    """By `file:line name`."""

    @property
    def long_share(self) -> float:
        """Share of the functions above `LONG_FUNCTION_LINES`."""
        return sum(lines > LONG_FUNCTION_LINES for lines in self.functions.values()) / len(self.functions)

    def row(self) -> str:
        """Median, 90th percentile and maximum, of files and of functions."""
        cells = []
        for lines in (sorted(self.files.values()), sorted(self.functions.values())):
            median, high, most = statistics.median(lines), percentile(lines, 0.9), lines[-1]
            cells.append(f"{len(lines):5}   {median:5.0f} / {high:4.0f} / {most:4}")
        return f"{self.language:<8}{cells[0]}   {cells[1]}   {self.long_share:.1%}"

    def problems(self, *, typical: bool) -> Iterator[str]:
        """What breaks a limit; `typical` asks for median and 90th percentile of the files too."""
        lines = sorted(self.files.values())
        if typical and statistics.median(lines) > MEDIAN_LINES:
            yield f"{self.language}: the median file has {statistics.median(lines):.0f} lines, above {MEDIAN_LINES}"
        if typical and percentile(lines, 0.9) > P90_LINES:
            yield f"{self.language}: the 90th percentile of the files is {percentile(lines, 0.9)}, above {P90_LINES}"
        for name, count in self.files.items():
            if count > MOST_LINES:
                yield f"{name}: {count} lines, above {MOST_LINES}"
        for name, count in self.functions.items():
            if count > MOST_FUNCTION_LINES:
                yield f"{name}: {count} lines, above {MOST_FUNCTION_LINES}"
        if self.long_share > MOST_LONG_FUNCTIONS:
            yield (
                f"{self.language}: {self.long_share:.1%} of the functions have more than {LONG_FUNCTION_LINES} lines, "
                f"above {MOST_LONG_FUNCTIONS:.0%}:"
            )
            for name, count in sorted(self.functions.items(), key=lambda item: -item[1]):
                if count > LONG_FUNCTION_LINES:
                    yield f"    {name}: {count}"


def percentile(ascending: list[int], share: float) -> int:
    """The smallest value that `share` of all do not exceed."""
    return ascending[min(int(share * len(ascending)), len(ascending) - 1)]


def python_sizes(sources: Mapping[str, str]) -> Sizes:
    functions = {}
    for name, text in sources.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                functions[f"{name}:{node.lineno} {node.name}"] = node.end_lineno - node.lineno + 1
    return Sizes(language="python", files=line_counts(sources), functions=functions)


def rust_sizes(sources: Mapping[str, str]) -> Sizes:
    functions = {
        f"{name}:{line} {function}": lines
        for name, text in sources.items()
        for function, line, lines in rust_functions(rust_source(text))
    }
    return Sizes(language="rust", files=line_counts(sources), functions=functions)


def line_counts(sources: Mapping[str, str]) -> dict[str, int]:
    return {name: len(text.splitlines()) for name, text in sources.items() if text.strip()}


def python_imports(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """The modules of ours that each module imports, anywhere but for type checking."""
    modules = {name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): name for name in sources}
    edges: dict[str, set[str]] = {}
    for module, name in modules.items():
        found: set[str] = set()
        for node in _running(ast.parse(sources[name])):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= (inner & modules.keys()) | ({node.module} if inner - modules.keys() else set())
        edges[module] = (found & modules.keys()) - {module}
    return edges


def _running(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        yield node
        yield from _running(node)


def circle(edges: Mapping[str, set[str]]) -> str | None:
    """One circle of the graph, in words; None if there is none."""
    try:
        graphlib.TopologicalSorter(edges).prepare()
    except graphlib.CycleError as error:
        return " -> ".join(error.args[1][::-1])
    return None


def untyped_per_1000(sources: Mapping[str, str]) -> float:
    lines = [line for text in sources.values() for line in text.splitlines()]
    return 1000 * sum(bool(_UNTYPED.search(line)) for line in lines) / max(len(lines), 1)


def main() -> int:
    python = {str(file.relative_to(ROOT)): file.read_text() for file in sorted((ROOT / "pmdflow").rglob("*.py"))}
    source = ROOT / "rust_buffer" / "src"
    rust = {
        str(file.relative_to(ROOT)): file.read_text() for file in sorted(source.rglob("*.rs")) if file.stem != "tests"
    }
    both = python_sizes(python), rust_sizes(rust)
    print("code    files  median / p90  / max   functions  median / p90 / max   longer than 40")
    print("\n".join(sizes.row() for sizes in both))
    untyped = untyped_per_1000({name: text for name, text in python.items() if name.startswith(SEAMS)})
    print(f"untyped lines in {' and '.join(SEAMS)}: {untyped:.1f} in 1,000")
    problems = [*both[0].problems(typical=True), *both[1].problems(typical=False)]
    if untyped > MOST_UNTYPED:
        problems.append(f"{' and '.join(SEAMS)}: {untyped:.1f} untyped lines in 1,000, above {MOST_UNTYPED:g}")
    rooms = rust_rooms({str(Path(name).relative_to("rust_buffer/src")): rust_source(rust[name]) for name in rust})
    for what, found in (("modules", circle(python_imports(python))), ("rooms", circle(rooms))):
        if found:
            problems.append(f"a circle of {what}: {found}")
    print("\n".join(problems) or "no limit is broken")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
