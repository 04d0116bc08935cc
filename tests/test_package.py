"""What the package says about itself: its licence, in every manifest and in what is installed."""

from __future__ import annotations

import tomllib
from importlib.metadata import metadata
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
