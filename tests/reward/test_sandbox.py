"""Hostile programs: each is contained, judged by how it ends, and leaves nothing behind."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pmdflow.reward import sandbox as sandbox_module
from pmdflow.reward.code import Case, run_cases
from pmdflow.reward.confinement import UNCONFINED, Confinement, confinements
from pmdflow.reward.sandbox import Sandbox, SandboxFailed, find_sandbox
from tests.reward.hostile_programs import ASSERTING, PRELUDE, PROGRAMS
from tests.support.reward import needs_sandbox, programs_below

CONTENT = "pmdflow-secret-content"
MEMORY = 512 << 20

pytestmark = needs_sandbox


def ways() -> list[Confinement]:
    """Those that hold for this user: root is limited in processes only where it becomes somebody else."""
    return [way for way in confinements(disk_bytes=64 << 20) if os.geteuid() != 0 or way.user]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What is outside: a file, an environment variable and two sockets where nobody must ever call."""
    secret = tmp_path_factory.mktemp("run") / "metrics-of-the-run.jsonl"
    secret.write_text(CONTENT)
    os.environ["PMDFLOW_TEST_SECRET"] = CONTENT
    name = f"pmdflow-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(f"\0{name}")
        unix.listen()
        yield {
            "SECRET_FILE": str(secret), "SECRET_NAME": secret.name, "SECRET_CONTENT": CONTENT,
            "PORT": str(tcp.getsockname()[1]), "SOCKET": name,
        }  # fmt: skip
        for server in (tcp, unix):
            server.setblocking(False)
            with pytest.raises(BlockingIOError):
                server.accept()
    del os.environ["PMDFLOW_TEST_SECRET"]


def check(source: str, case: Case, expected: set[str], world: dict[str, str], sandbox: Sandbox) -> None:
    """Run a program; it must end as expected, without having escaped, and leave nothing."""
    for name, value in world.items():
        source = source.replace(name, value)
    wall_s = 2.5 if "timeout" in expected else 30.0
    verdict = run_cases(PRELUDE + source, [case], sandbox=sandbox, wall_s=wall_s, time_limit_s=1.0, memory_bytes=MEMORY)
    assert verdict.kind in expected, verdict
    assert "ESCAPED" not in verdict.detail, verdict
    assert CONTENT not in verdict.detail, verdict
    assert Path(world["SECRET_FILE"]).read_text() == CONTENT
    assert not left_behind(sandbox.confinement)


def left_behind(way: Confinement) -> list[psutil.Process]:
    """Processes that a sandbox did not take with it."""
    found = programs_below(psutil.Process())
    if way.user:
        found += [process for process in psutil.process_iter(["uids"]) if process.info["uids"].real == way.user]
    return psutil.wait_procs(found, timeout=5)[1]


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_hostile_program_is_contained(name: str, world: dict[str, str]) -> None:
    source, expected = PROGRAMS[name]
    check(source, Case(stdout="right"), expected, world, find_sandbox())


@pytest.mark.parametrize("name", ASSERTING)
def test_a_program_cannot_leave_before_it_is_tested(name: str, world: dict[str, str]) -> None:
    source, expected = ASSERTING[name]
    check(source, Case(asserts="assert add(1, 2) == 3"), expected, world, find_sandbox())


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize("way", ways(), ids=lambda way: way.name)
def test_each_way_contains_them_all(way: Confinement, world: dict[str, str]) -> None:
    for source, expected in PROGRAMS.values():
        check(source, Case(stdout="right"), expected, world, Sandbox(confinement=way))


@pytest.mark.parametrize("way", [*ways(), UNCONFINED], ids=lambda way: way.name)
def test_each_way_tells_good_programs_from_bad_ones(way: Confinement) -> None:
    cases = [
        Case(stdin="1 2\n", stdout="3\n"), Case(stdin="-1 1", stdout="0"), Case(asserts="assert add(2, 2) == 4"),
    ]  # fmt: skip
    good = """
import sys
def add(a, b):
    return a + b
if sys.argv[0] == "main.py":
    print(add(*map(int, input().split())), " ")
"""
    programs = [
        good,
        *(good.replace("a + b", wrong) for wrong in ("a - b", "abs(a) + b", "a + b if a != b else 5")),
        "def add(:",
    ]
    verdicts = [
        run_cases(program, cases, sandbox=Sandbox(confinement=way), wall_s=60.0, time_limit_s=10.0, memory_bytes=MEMORY)
        for program in programs
    ]
    assert [(verdict.kind, verdict.case) for verdict in verdicts] == [
        ("passed", 0), ("wrong", 0), ("wrong", 1), ("wrong", 2), ("crashed", 0),
    ]  # fmt: skip
    assert "SyntaxError" in verdicts[-1].detail


def test_what_does_not_start_or_does_not_hold_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Sandbox(confinement=Confinement(name="broken", argv=("sh", "-c", "echo no room >&2; exit 1", "sh")))
    with pytest.raises(SandboxFailed, match="broken did not come to run the program: no room"):
        broken.run(["/bin/true"], files={})
    open_ways = [broken.confinement, UNCONFINED]
    monkeypatch.setattr(sandbox_module, "confinements", lambda disk_bytes: open_ways)
    with pytest.raises(SandboxFailed, match=r"(?s)no room; none: .* processes of the machine.*sandbox: none"):
        find_sandbox.__wrapped__()


def test_tests_that_need_more_time_than_there_is_are_no_fault_of_the_program() -> None:
    cases = [Case(stdout="")] * 500
    with pytest.raises(TimeoutError, match=r"500 tests .* raise reward\.timeout_s"):
        run_cases("pass", cases, sandbox=find_sandbox(), wall_s=1.5, time_limit_s=5.0, memory_bytes=MEMORY)
