"""Runs programs that nobody has read: confined, limited in everything, and in no way that was not tried first."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

from pmdflow.errors import PmdflowError
from pmdflow.reward.attendance import Ended, attend
from pmdflow.reward.confinement import PYTHON, UNCONFINED, Confinement, confinements

_ENTRY = Path(__file__).with_name("sandbox_entry.py")
ENTRY = _ENTRY.read_text()
"""First code inside, as text."""
_PROBE = """
import ctypes, os, socket, sys, time
assert os.getpid() < 100, "it sees the processes of the machine"
assert not os.path.exists(sys.argv[1]), "it sees the files of the machine"
for folder in ("/", "/usr", "/dev", "/proc"):
    assert not os.access(folder, os.W_OK), f"{folder} is writable"
try:
    socket.create_connection(("192.0.2.1", 9), timeout=0.2)
except OSError as error:
    assert not isinstance(error, TimeoutError), "it reaches the network"
assert ctypes.CDLL(None).unshare(0x10000000), "it makes user namespaces"
for started in range(int(sys.argv[2]) + 1):
    try:
        if os.fork() == 0:
            time.sleep(10)
    except OSError:
        break
assert started < int(sys.argv[2]), "its processes are not limited"
print("contained")
"""


class SandboxFailed(PmdflowError):
    """The sandbox did not come to run the program, which says nothing about the program."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a program may take. Each of its processes has its own memory and CPU time; they share the disk."""

    wall_s: float = 10.0
    cpu_s: int = 10
    memory_bytes: int = 1 << 30
    processes: int = 16
    """Threads count too."""
    open_files: int = 64
    disk_bytes: int = 64 << 20
    """Of `/tmp`, which is memory, and of each file."""
    output_bytes: int = 4 << 20
    """Of standard output and standard error, each; more ends the program."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sandbox:
    r"""A way to run programs.

    Example:
        >>> sandbox = find_sandbox()  # doctest: +SKIP
        >>> sandbox.run([PYTHON, "-I", "a.py"], files={"a.py": "print(input())"}, stdin=b"hello").stdout
        b'hello\n'
    """

    confinement: Confinement
    _entry: str = field(default=ENTRY, repr=False)

    def run(
        self, argv: Sequence[str], *, files: Mapping[str, str], stdin: bytes = b"", limits: Limits | None = None
    ) -> Ended:
        """Run a program to its end or to one of its limits.

        Args:
            argv: The program and its arguments.
            files: What its working directory holds, text by name.
            stdin: Its standard input.
            limits: What it may take.

        Raises:
            SandboxFailed: the program was not reached.
        """
        limits = limits or Limits()
        job = json.dumps({"argv": list(argv), "files": dict(files), "limits": asdict(limits)}).encode()
        reader, writer = os.pipe()
        with open(reader, "rb", buffering=0) as begins, contextlib.ExitStack() as stack:
            directory = None
            if self.confinement == UNCONFINED:
                directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="pmdflow-unconfined-"))
            with open(writer, "wb", buffering=0):
                process = self._start(writer, directory)
            ended = attend(
                process,
                b"%010d" % len(job) + job + stdin,
                begins=begins.fileno(),
                wall_s=limits.wall_s,
                output_bytes=limits.output_bytes,
            )
        if ended.wall_s is None:
            said = ended.stderr.decode(errors="replace").strip() or ended.how
            raise SandboxFailed(f"a sandbox by {self.confinement.name} did not come to run the program: {said}")
        return ended

    def _start(self, writer: int, directory: str | None) -> subprocess.Popen[bytes]:
        entry = [PYTHON, "-I", "-S", "-c", self._entry, str(writer), str(self.confinement.user)]
        return subprocess.Popen(
            [*self.confinement.argv, *entry],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(writer,),
            cwd=directory,
            env={"PATH": os.environ.get("PATH", os.defpath)},  # some of it is seen inside, as that of the first process
            bufsize=0,
            start_new_session=True,
        )


@lru_cache(maxsize=1)
def find_sandbox() -> Sandbox:
    """The first way to confine a program that holds on this machine, as a program that tries to break out shows.

    Raises:
        SandboxFailed: none does.
    """
    reasons = []
    limits = Limits()
    for confinement in confinements(disk_bytes=limits.disk_bytes):
        sandbox = Sandbox(confinement=confinement)
        try:
            probe = sandbox.run(
                [PYTHON, "-I", "-c", _PROBE, str(_ENTRY), str(limits.processes)], files={}, limits=limits
            )
        except SandboxFailed as error:
            reasons.append(str(error))
            continue
        if probe.stdout == b"contained\n":
            return sandbox
        said = probe.stderr.decode(errors="replace").strip().rpartition("\n")[2] or probe.how
        reasons.append(f"{confinement.name}: {said}")
    raise SandboxFailed(
        f"programs cannot be confined here: {'; '.join(reasons) or 'neither bwrap nor unshare is installed'}",
        hint="install bubblewrap and allow user namespaces, or run as root; only where every program is trusted, set "
        "args: {sandbox: none} of the reward function",
    )
