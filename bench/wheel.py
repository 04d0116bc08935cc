"""Does the wheel work where there is no Rust?

Builds the source distribution, from it the wheel with maturin's own repair, and lets auditwheel say what it needs.
Then, on each Python, in a fresh environment whose PATH has no Rust: install, `pmdflow init`, a short run, `status`,
`replay`, the page, `export`. The project's folder is not in sight.

    uv run python bench/wheel.py 3.11 3.12 3.13     # versions or paths, as `uv venv --python` takes them
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
MATURIN = "maturin==1.16.0"
SYSTEM = "/usr/bin:/bin"
PAGE_TIMEOUT_S = 60.0


def say(*arguments: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Run a program and answer what it says; end with its output if it fails."""
    done = subprocess.run(
        [str(word) for word in arguments], cwd=cwd, env=env, text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{' '.join(map(str, arguments))} ended with {done.returncode}:\n{done.stdout}")
    return done.stdout


def build(out: Path) -> Path:
    """The wheel, made from nothing but the source distribution."""
    uv = shutil.which("uv") or sys.exit("uv is not on PATH")
    say(uv, "build", "--sdist", "--out-dir", out, cwd=ROOT)
    source = next(out.glob("*.tar.gz"))
    with tarfile.open(source) as archive:
        archive.extractall(out, filter="data")
    folder = out / source.name.removesuffix(".tar.gz")
    options = ("--release", "--strip", "--auditwheel", "repair", "--out", out)
    say(uv, "tool", "run", MATURIN, "build", *options, cwd=folder)
    wheel = next(out.glob("*.whl"))
    print(say(uv, "tool", "run", "auditwheel", "show", wheel, cwd=out))
    return wheel


def try_on(python: str, wheel: Path, folder: Path) -> str:
    """Install and use it; one line of what came of it."""
    uv = shutil.which("uv") or sys.exit("uv is not on PATH")
    started = time.monotonic()
    say(uv, "venv", "--python", python, folder / "venv", cwd=folder)
    programs = folder / "venv" / "bin"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("CARGO", "RUSTUP", "PYTHON"))}
    env = {**kept, "PATH": f"{programs}:{SYSTEM}", "VIRTUAL_ENV": str(folder / "venv"), "CUDA_VISIBLE_DEVICES": ""}
    assert not any(shutil.which(name, path=env["PATH"]) for name in ("cargo", "rustc", "rustup")), "Rust is in sight"
    say(uv, "pip", "install", "--only-binary", "pmdflow", wheel, cwd=folder, env=env)
    installed = time.monotonic()
    version = say(programs / "python", "--version", cwd=folder, env=env).strip()
    work = folder / "work"
    work.mkdir()

    def pmdflow(*arguments: str) -> str:
        return say(programs / "pmdflow", *arguments, cwd=work, env=env)

    pmdflow("init")
    pmdflow("up", "quickstart.yaml", "run.iterations=2", "eval.prompts=8")
    assert "not running" in pmdflow("status", "runs/quickstart")
    assert "2 of 2 iterations have equal losses" in pmdflow("replay", "runs/quickstart", "--verify")
    with dashboard(programs / "pmdflow", work, env) as page:
        assert "quickstart" in page
    pmdflow("export", "runs/quickstart", "exported")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in (work / "exported").iterdir()
    }
    used = time.monotonic() - installed
    return (
        f"{version}: installed in {installed - started:.0f} s; init, up, status, replay, page, export in {used:.0f} s"
    )


@contextmanager
def dashboard(program: Path, work: Path, env: dict[str, str]) -> Iterator[str]:
    """The page that `pmdflow dashboard` serves."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([program, "dashboard", "runs/quickstart", "--port", str(port)], cwd=work, env=env)
    deadline = time.monotonic() + PAGE_TIMEOUT_S
    try:
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=PAGE_TIMEOUT_S) as answer:
                    yield answer.read().decode()
                return
            except OSError:
                if time.monotonic() > deadline or process.poll() is not None:
                    raise
                time.sleep(0.2)
    finally:
        process.terminate()
        process.wait(timeout=PAGE_TIMEOUT_S)


def main() -> int:
    """Build once, try on every Python that the command line names."""
    with tempfile.TemporaryDirectory(prefix="pmdflow-wheel-") as name:
        wheel = build(Path(name))
        print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB")
        for number, python in enumerate(sys.argv[1:] or ["3.11", "3.12", "3.13"]):
            folder = Path(name) / str(number)
            folder.mkdir()
            print(try_on(python, wheel, folder), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
