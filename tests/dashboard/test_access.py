"""Who may read the pages: other names, other machines, the token and its file."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from starlette.testclient import TestClient

from pmdflow.config.schema import DashboardConfig
from pmdflow.dashboard.access import TOKEN_FILE, is_local, shown_link, token_of, url_of
from pmdflow.dashboard.process import DashboardProcess
from pmdflow.dashboard.server import make_app
from pmdflow.errors import LaunchError

OUTSIDE = "http://gpu-7.example:8000"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text("run: {name: new}\n")
    return tmp_path


def visitor(run: Path, *, token: str | None = "the-secret", host: str = "0.0.0.0", url: str = OUTSIDE) -> TestClient:
    return TestClient(make_app(run, host=host, token=token), base_url=url, follow_redirects=False)


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("127.0.0.1:8000", 200), ("localhost", 200), ("LOCALHOST:1", 200), ("[::1]:8000", 200), ("127.0.0.7:80", 200),
        ("evil.example", 400), ("127.0.0.1.evil.example:8000", 400), ("localhost@evil.example", 400), ("[::1", 400),
        ("", 400), ("127.0.0.8", 400),
    ],
)  # fmt: skip
def test_without_a_token_only_names_of_this_machine_are_answered(run: Path, name: str, status: int) -> None:
    client = visitor(run, token=None, host="127.0.0.7", url="http://127.0.0.1")
    assert client.get("/", headers={"host": name}).status_code == status


@pytest.mark.parametrize(
    "path", ["/", "/api/update", "/events", "/trajectories", "/static/style.css", "/plotly.min.js"]
)
def test_no_page_is_shown_without_the_token(run: Path, path: str) -> None:
    client = visitor(run)
    for given in ("", "?token=", "?token=the-secre", "?token=%C3%A4"):
        answer = client.get(path + given)
        assert answer.status_code == 401 and TOKEN_FILE in answer.text and "WWW-Authenticate" in answer.headers
        assert "set-cookie" not in answer.headers and "the-secret" not in answer.text and str(run) not in answer.text
    assert client.get(path, headers={"authorization": "Bearer the-secret"}, params={"token": "no"}).status_code == 401


def test_the_link_of_the_first_visit_opens_all_pages_and_leaves_no_token_in_the_address(run: Path) -> None:
    client = visitor(run)
    answer = client.get("/trajectories?sort=reward&token=the-secret&page=0")
    assert (answer.status_code, answer.headers["location"]) == (303, "/trajectories?sort=reward&page=0")
    assert "httponly" in answer.headers["set-cookie"].lower() and "samesite=lax" in answer.headers["set-cookie"].lower()
    assert client.get("/").status_code == client.get("/trajectories").status_code == 200
    other = visitor(run, token="another-secret")
    other.cookies = client.cookies
    assert other.get("/").status_code == 401
    assert other.get("/?token=another-secret").status_code == 303
    assert other.get("/").status_code == client.get("/").status_code == 200  # one cookie jar, two runs


def test_a_program_sends_the_token_as_a_bearers(run: Path) -> None:
    answer = visitor(run).get("/api/update", headers={"authorization": "bearer the-secret"})
    assert "chart:reward" in answer.json()


def test_the_redirect_stays_on_this_host(run: Path) -> None:
    target = visitor(run).get(f"{OUTSIDE}//evil.example/x?token=the-secret").headers["location"]
    assert target == "/evil.example/x"


def test_a_runs_token_is_made_once_and_is_its_owners_alone(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        tokens = set(pool.map(token_of, [tmp_path] * 32))
    (token,) = tokens
    assert len(token) >= 40
    assert [path.name for path in tmp_path.iterdir()] == [TOKEN_FILE]
    assert (tmp_path / TOKEN_FILE).stat().st_mode & 0o777 == 0o600


def test_a_token_that_is_no_secret_is_refused(tmp_path: Path) -> None:
    token_of(tmp_path)
    (tmp_path / TOKEN_FILE).chmod(0o640)
    with pytest.raises(LaunchError, match=r"can be read by others \(mode 0640\)"):
        token_of(tmp_path)
    (tmp_path / TOKEN_FILE).chmod(0o600)
    (tmp_path / TOKEN_FILE).write_text("\n")
    with pytest.raises(LaunchError, match="holds 0 characters"):
        token_of(tmp_path)
    with pytest.raises(LaunchError, match=r"nowhere/dashboard\.token: No such file"):
        token_of(tmp_path / "nowhere")


def test_what_is_local_and_what_a_browser_opens() -> None:
    assert all(map(is_local, ("127.0.0.1", "127.8.9.1", "::1", "localhost")))
    assert not any(map(is_local, ("0.0.0.0", "::", "10.0.0.1", "node-3", "localhost.evil.example", "")))
    assert url_of("::1", 80) == "http://[::1]:80" and url_of("10.0.0.1", 80) == "http://10.0.0.1:80"
    assert "0.0.0.0" not in url_of("0.0.0.0", 80)


def test_a_log_file_does_not_get_the_token(tmp_path: Path) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert shown_link(tmp_path, "http://a:1", "secret", Terminal()) == "http://a:1/?token=secret"
    written = shown_link(tmp_path, "http://a:1", "secret", io.StringIO())
    assert "secret" not in written and str(tmp_path / TOKEN_FILE) in written
    assert shown_link(tmp_path, "http://a:1", None, io.StringIO()) == "http://a:1"


def test_a_run_serves_every_address_with_a_token_that_only_its_file_keeps(run: Path) -> None:
    (run / "logs").mkdir()
    output = io.StringIO()
    with DashboardProcess.start(run, DashboardConfig(host="0.0.0.0"), output=output) as dashboard:
        token = (run / TOKEN_FILE).read_text().strip()
        assert dashboard.url is not None and f"{dashboard.url} (token: {run / TOKEN_FILE})" in output.getvalue()
        url = f"http://127.0.0.1:{dashboard.url.rsplit(':', 1)[1]}"
        log = run / "logs" / "dashboard.log"
        wait_until(lambda: "dashboard: " in log.read_text())
        assert httpx.get(url).status_code == httpx.get(url, headers={"host": "evil.example"}).status_code == 401
        assert httpx.get(f"{url}/?token={token}", follow_redirects=True).status_code == 200
    assert token not in log.read_text() + output.getvalue()


def wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_host_of_another_machine_is_one_clear_line(run: Path) -> None:
    arguments = ["-m", "pmdflow.cli", "dashboard", str(run), "--host", "192.0.2.1"]
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "host '192.0.2.1' is no address of this machine" in done.stderr and "hint" in done.stderr
