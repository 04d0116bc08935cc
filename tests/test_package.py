"""What the package says about itself: its licence, in every manifest and in what is installed, and what it needs."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import distributions, metadata, packages_distributions
from typing import Any

import pytest

from tests.support.paths import ROOT

MANIFESTS = ("pyproject.toml", "rust_buffer/Cargo.toml", "rust_buffer/fuzz/Cargo.toml")


def manifest(name: str) -> dict[str, Any]:
    parsed = tomllib.loads((ROOT / name).read_text())
    found: dict[str, Any] = parsed.get("project") or parsed["package"]
    return found


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_manifest_names_the_licence(name: str) -> None:
    assert manifest(name)["license"] == "Apache-2.0"


def test_the_licence_is_whole_and_says_whose_it_is() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License\n" in text and "END OF TERMS AND CONDITIONS" in text
    assert "Copyright 2026 the pmdflow authors" in text
    assert "[name of copyright owner]" not in text


def test_what_is_installed_names_it_too() -> None:
    installed = metadata("pmdflow")
    assert installed["License-Expression"] == "Apache-2.0"
    assert installed.get_all("License-File") == ["LICENSE"]


def test_every_import_comes_with_a_dependency_or_an_extra() -> None:
    project = manifest("pyproject.toml")
    wanted = project["dependencies"] + [name for extra in project["optional-dependencies"].values() for name in extra]
    declared = {_plain(name) for name in wanted}
    installed = {_plain(found.name): found for found in distributions()}
    carried = {_plain(need) for name in declared & installed.keys() for need in installed[name].requires or ()}
    owners = packages_distributions()
    missing = {}
    for path in (ROOT / "pmdflow").rglob("*.py"):
        for module in _imports(ast.parse(path.read_text())) - {"pmdflow", *sys.stdlib_module_names}:
            found = {_plain(name) for name in owners.get(module, [])}
            if found and not found & (declared | carried):
                missing[module] = path.name
    assert missing == {}


def _plain(requirement: str) -> str:
    return re.split(r"[\[(=<>~!;, ]", requirement)[0].lower().replace("_", "-")


def _imports(tree: ast.AST) -> set[str]:
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    found |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.partition(".")[0] for name in found}
