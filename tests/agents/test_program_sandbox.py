"""Sandboxed programs: they reach the gateway and nothing else, and leave nothing."""

from __future__ import annotations

import http.server
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pmdflow.agents.program import Program
from pmdflow.agents.sandbox import ADDRESS, Walls
from pmdflow.reward.confinement import PYTHON, confinements
from tests.support.reward import needs_sandbox

pytestmark = needs_sandbox

LOOKS = """
import ctypes, json, os, pathlib, socket, sys, urllib.request
task = json.load(sys.stdin)

def reaches(address):
    try:
        socket.create_connection(address, timeout=0.5).close()
    except OSError as error:
        return isinstance(error, TimeoutError)
    return True

def text_of(path):
    try:
        return path.read_text()
    except PermissionError:
        return ""

found = {
    "gateway": urllib.request.urlopen(os.environ["OPENAI_BASE_URL"] + "/models").read().decode(),
    "loopback": reaches(("127.0.0.1", task["port"])),
    "machine": reaches((task["address"], task["port"])),
    "network": reaches(("192.0.2.1", 9)),
    "abstract": not socket.socket(socket.AF_UNIX).connect_ex("\\0" + task["unix"]),
    "files": [name for name in task["files"] if os.path.exists(name)],
    "listed": sorted(os.listdir(task["folder"])) if os.path.exists(task["folder"]) else [],
    "processes": [pid for pid in os.listdir("/proc") if pid.isdigit() and int(pid) > 100],
    "outside": [pid for pid in task["pids"] if os.path.exists(f"/proc/{pid}/environ")],
    "secret": [one for one in pathlib.Path("/proc").glob("[0-9]*/environ") if "PMDFLOW_SECRET" in text_of(one)],
    "variables": "PMDFLOW_SECRET" in os.environ,
    "writes": [name for name in ["/usr", "/", task["readable"]] if os.access(name, os.W_OK)],
    "namespaces": not ctypes.CDLL(None).unshare(0x10000000),
}
print(json.dumps(found))
open(os.environ["PMDFLOW_REWARD_FILE"], "w").write("0.5")
"""


class Models(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"models of " + self.path.encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def gateway() -> Iterator[tuple[str, int]]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Models) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield "127.0.0.1", server.server_port
        server.shutdown()


WAYS = [way.name for way in confinements(disk_bytes=1 << 20) if os.geteuid() != 0 or way.user]


def start(walls: Walls, *argv: str, timeout_s: float = 60.0, **task: object) -> Program:
    return Program.start(
        argv, env={"OPENAI_BASE_URL": f"{ADDRESS}/episodes/7/v1", "OPENAI_API_KEY": "sk-of-7"}, task=task,
        work=walls.run_dir / "agents" / "7-1", log=walls.run_dir / "logs" / "7-1.log", timeout_s=timeout_s, walls=walls,
    )  # fmt: skip


def walls(tmp_path: Path, gateway: tuple[str, int], way: str = "") -> Walls:
    run = tmp_path / "project" / "runs" / "one"
    run.mkdir(parents=True)
    return Walls(way=way, gateway=gateway, run_dir=run) if way else Walls.find(f"http://{gateway[0]}:{gateway[1]}", run)


def left(walls: Walls) -> list[psutil.Process]:
    """Processes that name the run directory, as each keeper and each sandbox does."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(walls.run_dir) in " ".join(process.cmdline()) + " ".join(process.environ().values()):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


@pytest.mark.parametrize("way", WAYS)
def test_it_reaches_the_gateway_and_nothing_else(
    tmp_path: Path, gateway: tuple[str, int], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = walls(tmp_path, gateway, way)
    project = tmp_path / "project"
    (project / "my_helper.py").write_text("")
    (room.run_dir / "config.yaml").write_text("secret")
    monkeypatch.syspath_prepend(str(project))
    monkeypatch.setenv("PMDFLOW_SECRET", "x")
    name = f"pmdflow-agent-{os.getpid()}"
    with socket.create_server(("0.0.0.0", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(f"\0{name}")
        unix.listen()
        program = start(
            room, PYTHON, "-c", "import my_helper\n" + LOOKS,
            port=tcp.getsockname()[1], address=socket.gethostbyname(socket.gethostname()), unix=name,
            files=[str(room.run_dir / "config.yaml"), "/etc/passwd", str(Path(__file__).home() / ".bashrc")],
            folder=str(project / "runs"), pids=[os.getpid(), os.getppid()], readable=str(project),
        )  # fmt: skip
        assert program.ended.result(timeout=90) == "", (room.run_dir / "logs" / "7-1.log").read_text()
        for server in (tcp, unix):
            server.setblocking(False)
            with pytest.raises(BlockingIOError):
                server.accept()
    found = json.loads((room.run_dir / "logs" / "7-1.log").read_text())
    assert found.pop("gateway") == "models of /episodes/7/v1/models"
    assert not any(found.values()), found
    assert program.rewards == {"reward": 0.5}
    assert left(room) == []
    assert list((room.run_dir / "agents").iterdir()) == []


LEAKS = """
import os, subprocess, sys, time
for _ in range(3):
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
open("left.txt", "w").write("x")
print("started", flush=True)
time.sleep(float(sys.argv[1]))
"""


@pytest.mark.parametrize("how", ["ends", "deadline", "kill", "keeper"])
def test_nothing_of_it_outlives_it(tmp_path: Path, gateway: tuple[str, int], how: str) -> None:
    room = walls(tmp_path, gateway)
    program = start(
        room, PYTHON, "-c", LEAKS, "0" if how == "ends" else "600", timeout_s=6 if how == "deadline" else 60
    )
    log, deadline = room.run_dir / "logs" / "7-1.log", time.monotonic() + 60
    while how in ("kill", "keeper") and not (log.exists() and log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    if how == "kill":
        program.kill()
    if how == "keeper":
        assert program.keeper is not None
        os.kill(program.keeper.pid, signal.SIGKILL)
    expected = {"ends": "", "deadline": "did not end within 6 s", "kill": "killed", "keeper": "its keeper was killed"}
    assert expected[how] in program.ended.result(timeout=90)
    assert program.died == (how == "keeper")
    psutil.wait_procs(left(room), timeout=10)
    assert left(room) == []
    assert list((room.run_dir / "agents").iterdir()) == []


def test_another_sandbox_is_a_fresh_one_and_its_death_by_a_signal_is_told(
    tmp_path: Path, gateway: tuple[str, int]
) -> None:
    room = walls(tmp_path, gateway)
    code = "import os; assert not os.path.exists('x'); open('x', 'w'); os.kill(os.getpid(), 9)"
    for _ in range(2):
        program = start(room, PYTHON, "-c", code)
        assert "signal 9" in program.ended.result(timeout=90)
        assert program.died


def test_a_gateway_that_is_not_there_is_told_and_its_connections_are_not_kept(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    room = walls(tmp_path, ("127.0.0.1", port))
    code = """
import socket
for _ in range(200):
    with socket.create_connection(("127.0.0.1", 8000), timeout=20) as one:
        assert one.recv(1) == b""
"""
    assert start(room, PYTHON, "-c", code).ended.result(timeout=90) == ""


def test_its_own_scripts_are_read_wherever_they_lie(tmp_path: Path, gateway: tuple[str, int]) -> None:
    room = walls(tmp_path, gateway)
    real, linked = tmp_path / "real", tmp_path / "linked"
    real.mkdir()
    linked.symlink_to(real)
    (real / "agent.py").write_text("print('hello')")
    assert start(room, "python", str(linked / "agent.py")).ended.result(timeout=90) == ""
    assert (room.run_dir / "logs" / "7-1.log").read_text() == "hello\n"
