"""The command line: what it parses, what it dispatches to, how it ends."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import pmdflow
import pmdflow.dashboard
import pmdflow.replay
import pmdflow.run
from pmdflow.cli import app, main
from pmdflow.config.load import Loaded
from pmdflow.errors import LaunchError
from tests.support.fixture_run import FixtureRun
from tests.support.paths import ROOT

QUICKSTART = "configs/quickstart.yaml"
QUICK_REWARD = "reward.functions.0.function=math:sqrt"
"""Imported at once, where nothing is scored."""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the real program."""
    return subprocess.run(
        [sys.executable, "-m", "pmdflow.cli", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", "COLUMNS": "120"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def install(monkeypatch: pytest.MonkeyPatch, package: types.ModuleType, name: str, **functions: Any) -> None:
    """Put a module in the place of one that would start processes."""
    module = types.ModuleType(f"{package.__name__}.{name}")
    for key, function in functions.items():
        setattr(module, key, function)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(package, name, module, raising=False)


def test_a_dry_run_prints_the_plan_and_starts_nothing() -> None:
    before = set((ROOT / "runs").glob("*"))
    done = run("up", QUICKSTART, "run.name=never", "scheduler.max_staleness=5", "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    assert "override" in done.stdout
    assert "active groups" in done.stdout
    assert "nothing was started" in done.stdout
    assert set((ROOT / "runs").glob("*")) == before


def test_a_machine_elsewhere_is_planned_for_without_its_engine() -> None:
    done = run("up", QUICKSTART, "run.name=never", "rollout.engine=vllm", "cluster.gpus=8x80GiB", "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    assert "planned for 8 GPUs, stated by cluster.gpus" in done.stdout
    assert "key-value cache" in done.stdout


@pytest.mark.parametrize(("where", "said"), [("/dev/full", "No space left on device"), ("a pipe nobody reads", "")])
def test_output_that_cannot_be_written_is_one_line_and_a_reader_that_is_gone_none(where: str, said: str) -> None:
    reading, output = os.pipe()
    os.close(reading)
    if where == "/dev/full":
        os.close(output)
        output = os.open(where, os.O_WRONLY)
    done = subprocess.run(
        [sys.executable, "-m", "pmdflow.cli", "--version"],
        cwd=ROOT, stdout=output, stderr=subprocess.PIPE, text=True, check=False,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
    )  # fmt: skip
    os.close(output)
    assert done.returncode == 1
    assert done.stderr == (f"error: the output cannot be written: {said}\n" if said else "")


@pytest.mark.parametrize("closed", ["<&- >&-", "<&- >&- 2>&-"])
def test_closed_streams_are_as_good_as_nowhere(closed: str) -> None:
    command = f"{sys.executable} -m pmdflow.cli status runs {closed}"
    done = subprocess.run(["/bin/sh", "-c", command], cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert ("2>&-" in closed) != done.stderr.startswith("error: runs")


def test_configuration_errors_exit_with_2_and_are_all_on_stderr() -> None:
    done = run("up", QUICKSTART, "scheduler.max_stalenes=5", "run.iterations=0", "learner.lr=fast")
    assert (done.returncode, done.stdout) == (2, "")
    assert "hint: did you mean `max_staleness`?" in done.stderr
    assert done.stderr.count(": error: ") == 3
    assert "Traceback" not in done.stderr
    assert done.stderr.endswith("3 errors; nothing was started\n")


@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_an_import_path_that_leads_to_nothing_exits_with_2_before_anything_starts(
    dry: list[str], tmp_path: Path
) -> None:
    wrong = "reward.functions.0.function=pmdflow.reward.reasoning_gim:score"
    done = run("up", QUICKSTART, f"run.dir={tmp_path}", wrong, *dry)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"override `{wrong}`: error: `reward.functions.0.function`: there is no module" in done.stderr
    assert "hint: did you mean `pmdflow.reward.reasoning_gym`?" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_usage_errors_exit_with_2() -> None:
    assert run("up").returncode == 2
    assert run("fly").returncode == 2


@pytest.mark.parametrize("command", [["--help"], ["status", "RUN"], ["down", "RUN"]], ids=lambda words: words[0])
def test_commands_that_only_look_load_nothing_heavy(command: list[str], tmp_path: Path) -> None:
    run = FixtureRun(tmp_path / "run")
    run.iterate(2, archive=False)
    (run.run_dir / "run.lock").touch()
    script = (
        "import sys\n"
        "from pmdflow.cli import main\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as ended:\n"
        "    print(ended.code, *{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)\n"
    )
    words = [word.replace("RUN", str(run.run_dir)) for word in command]
    done = subprocess.run(
        [sys.executable, "-c", script, *words], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    code, *loaded = done.stderr.splitlines()[-1].split()
    assert code == ("1" if command[0] == "down" else "0")  # it is not running
    assert "typer" in loaded
    heavy = {"numpy", "ray", "reasoning_gym", "safetensors", "tokenizers", "torch", "transformers", "vllm", "zarr"}
    assert not heavy & set(loaded)


def test_the_driver_needs_torch_neither_for_its_actors_nor_for_a_general_tokenizer() -> None:
    script = (
        "import sys, pmdflow.run.launch, pmdflow.replay.command\n"
        "from pmdflow.data.tokenizer import load_tokenizer\n"
        "print('torch' in sys.modules)\n"
        "general = load_tokenizer('configs/tiny-calculator')\n"
        "print('torch' in sys.modules)\n"
        "from transformers import AutoTokenizer\n"
        "auto = AutoTokenizer.from_pretrained('configs/tiny-calculator')\n"
        "print(type(auto) is type(general) and auto.get_vocab() == general.get_vocab())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == ["False", "False", "True"]


def test_evaluation_loads_no_ray() -> None:
    script = "import sys, pmdflow.evaluate.command; print('ray' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "False\n"


def test_help_names_every_command() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert all(command in result.output for command in ("up", "down", "status", "dashboard", "replay"))


def test_a_named_error_is_one_line_and_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(loaded: Loaded) -> int:
        raise LaunchError(f"{loaded.config.model.path} has no tokenizer")

    install(monkeypatch, pmdflow.run, "launch", up=refuse)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["pmdflow", "up", QUICKSTART, "model.path=elsewhere", QUICK_REWARD])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert capsys.readouterr() == ("", "error: elsewhere has no tokenizer\n")


def test_an_interrupt_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(run: Path) -> int:
        raise KeyboardInterrupt

    install(monkeypatch, pmdflow.run, "status", status=interrupt)
    monkeypatch.setattr(sys, "argv", ["pmdflow", "status", "runs/a"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130


@pytest.mark.parametrize("code", [0, 1, 130])
def test_the_exit_code_is_that_of_the_command(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    seen: list[Any] = []

    def answer(argument: Any) -> int:
        seen.append(argument)
        return code

    install(monkeypatch, pmdflow.run, "launch", up=answer)
    install(monkeypatch, pmdflow.run, "status", down=answer, status=answer)
    runner = CliRunner()
    assert runner.invoke(app, ["up", str(ROOT / QUICKSTART), "run.seed=9", QUICK_REWARD]).exit_code == code
    assert runner.invoke(app, ["down", "runs/a"]).exit_code == code
    assert runner.invoke(app, ["status", "runs/a"]).exit_code == code
    assert seen[0].config.run.seed == 9
    assert seen[1:] == [Path("runs/a"), Path("runs/a")]


def test_replay_and_dashboard_pass_their_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    install(monkeypatch, pmdflow.dashboard, "server", serve=lambda runs, **options: seen.append((runs, options)))
    install(monkeypatch, pmdflow.replay, "command", replay=lambda run, **options: seen.append((run, options)))
    runner = CliRunner()
    assert runner.invoke(app, ["dashboard", "runs/a", "runs/b", "--port", "8080"]).exit_code == 0
    runner.invoke(app, ["replay", "runs/a", "--verify"])
    runner.invoke(app, ["replay", "runs/a", "--from", "5", "--set", "learner.tau=0.1", "--set", "learner.lr=0.2"])
    assert seen == [
        ([Path("runs/a"), Path("runs/b")], {"host": "127.0.0.1", "port": 8080}),
        (Path("runs/a"), {"verify": True, "start": 0, "overrides": ()}),
        (Path("runs/a"), {"verify": False, "start": 5, "overrides": ["learner.tau=0.1", "learner.lr=0.2"]}),
    ]
