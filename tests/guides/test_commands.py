"""Every command of every guide is one that the program takes, and every configuration in them is valid."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from pmdflow.cli import app
from pmdflow.config.errors import ConfigError
from pmdflow.config.load import load
from tests.support.config import MINIMAL
from tests.support.guides import Step, steps
from tests.support.paths import ROOT

GUIDES = sorted([ROOT / "README.md", *(ROOT / "pmdflow").rglob("*.md")])
TWO_COMMANDS = "    pip install uv && uv run pmdflow up configs/quickstart.yaml\n    pip install uv && uv run pytest\n"
COMMANDS = {
    f"{guide.relative_to(ROOT)}: {step.text}": step
    for guide in GUIDES
    for step in steps(guide)
    if step.language == "command"
}


@pytest.fixture(scope="module")
def program() -> Any:
    return typer.main.get_command(app)


@pytest.mark.parametrize("step", COMMANDS.values(), ids=COMMANDS.keys())
def test_a_command_is_one_that_the_program_takes(step: Step, program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name, *arguments = step.arguments
    command = program.commands[name]
    context = command.make_context(name, arguments)
    if name != "up":
        return
    monkeypatch.chdir(ROOT if step.arguments[1].startswith("configs/") else ROOT / "configs")
    if Path(context.params["config"]).is_file():
        load(context.params["config"], context.params["overrides"] or ())
    else:
        assert context.params["config"] == Path("own.yaml")  # the reader writes it, see below


def test_the_two_commands_are_what_they_always_were() -> None:
    assert TWO_COMMANDS in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: str(guide.relative_to(ROOT)))
def test_what_a_guide_names_is_there(guide: Path) -> None:
    for named in re.findall(r"`((?:configs|pmdflow|bench|tests|rust_buffer)/[\w./-]+)`", guide.read_text()):
        assert (ROOT / named).exists(), named


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: str(guide.relative_to(ROOT)))
def test_settings_of_a_guide_are_valid(guide: Path, tmp_path: Path) -> None:
    for step in steps(guide):
        if step.language == "yaml":
            settings = yaml.safe_load(MINIMAL)
            for section, values in yaml.safe_load(step.text).items():
                settings[section] = {**settings.get(section, {}), **values}
            (tmp_path / "guide.yaml").write_text(yaml.safe_dump(settings))
            try:
                load(tmp_path / "guide.yaml")
            except ConfigError as error:
                pytest.fail(f"{step.text}\n{error}")


def test_every_room_is_on_the_map() -> None:
    on_map = set(re.findall(r"^\| `(\w+)/`", (ROOT / "README.md").read_text(), re.MULTILINE))
    rooms = {path.parent.name for path in (ROOT / "pmdflow").glob("*/__init__.py")}
    assert rooms <= on_map


def map_rows() -> list[list[str]]:
    """Rooms of the map, with what they own and, of Python's, what they may import beside rooms below."""
    lines = re.findall(r"^\| `\w+/` \|.*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


@pytest.mark.parametrize("row", map_rows(), ids=lambda row: row[0].strip("`"))
def test_a_room_of_the_map_has_what_it_is_said_to_own(row: list[str]) -> None:
    name, owns, *rest = row
    is_python = bool(rest)
    room = (ROOT / "pmdflow" if is_python else ROOT / "rust_buffer" / "src") / name.strip("`")
    found = {path.stem for path in room.rglob("*")}
    text = "".join(path.read_text() for path in room.rglob("*.py" if is_python else "*.rs"))
    for named in re.findall(r"`([a-z_]+)/?`", owns):
        assert named in found or f"def {named}(" in text or (ROOT / named).is_dir(), named
    if not is_python:
        return
    users = {path.stem for path in room.rglob("*.py") if re.search(r"^(?:import|from) ray\b", path.read_text(), re.M)}
    allowed = re.search(r"(?<!no )Ray(?: in ((?:`\w+`(?: and )?)+))?", rest[0])
    listed = re.findall(r"`(\w+)`", allowed[1]) if allowed and allowed[1] else None
    assert users == set(listed) if listed else bool(users) == bool(allowed)
