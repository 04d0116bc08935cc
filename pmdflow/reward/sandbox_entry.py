"""First code inside a sandbox: takes the job from standard input, gives up every right, and becomes the program.

The sandbox's own interpreter gets it as text, so it imports nothing but the standard library. Arguments: the file
descriptor that says the sandbox holds, and the user id to become (0: stay). Standard input begins with the length of
the job in ten digits and the job in JSON, `{"argv", "files", "limits"}`; what follows it is the program's. A job may
have an `env`, and a `port`: a socket that listens there is sent with the word, and whoever holds its other end answers.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import socket
import struct
import sys
from typing import Any

RESOURCES = {
    "memory_bytes": resource.RLIMIT_AS,
    "processes": resource.RLIMIT_NPROC,
    "open_files": resource.RLIMIT_NOFILE,
    "disk_bytes": resource.RLIMIT_FSIZE,
}

_CLONE_NEWUSER = 0x10000000  # linux/sched.h
_CALLS = {
    "x86_64": (0xC000003E, 56, 435, 272, 101),
    "aarch64": (0xC00000B7, 220, 435, 97, 117),
}
"""AUDIT_ARCH, and the numbers of clone, clone3, unshare and ptrace, by machine."""


def main() -> None:
    """Never return; if something is amiss, fail before the descriptor has said a word."""
    holds, user = int(sys.argv[1]), int(sys.argv[2])
    job: dict[str, Any] = json.loads(_read(int(_read(10))))
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # where memory runs out, the kernel takes this first
    if user:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    for name, text in job["files"].items():
        with open(name, "w", encoding="utf-8", errors="surrogatepass") as file:
            file.write(text)
    limits = job["limits"]
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (limits["cpu_s"], limits["cpu_s"] + 1))  # a signal, then the kill
    for name, kind in RESOURCES.items():
        resource.setrlimit(kind, (limits[name], limits[name]))
    _forbid_calls(*_CALLS[os.uname().machine])
    os.set_inheritable(holds, False)
    if "port" in job:
        with socket.socket(fileno=holds) as outside, socket.create_server(("127.0.0.1", job["port"])) as listener:
            socket.send_fds(outside, [b"1"], [listener.fileno()])
    else:
        os.write(holds, b"1")
    env = {"HOME": os.getcwd(), "PATH": "/usr/bin:/bin"} | job.get("env", {})
    os.execvpe(job["argv"][0], job["argv"], env)  # noqa: S606


def _forbid_calls(architecture: int, clone: int, clone3: int, unshare: int, ptrace: int) -> None:
    """Have the kernel refuse to trace, and user namespaces, in which a program would have rights that it lost outside.

    A filter of system calls (seccomp) in the kernel's packet-filter code. The flags of clone3 lie in memory, where a
    filter cannot look; as if it were not there, the C library falls back to clone.
    """
    load, equal, any_bit, end = 0x20, 0x15, 0x45, 0x06  # linux/bpf_common.h
    allow, refuse, kill = 0x7FFF0000, 0x00050000, 0x80000000  # linux/seccomp.h
    code = [
        (load, 0, 0, 4), (equal, 1, 0, architecture), (end, 0, 0, kill),
        (load, 0, 0, 0), (any_bit, 0, 1, 0x40000000), (end, 0, 0, kill),  # the x32 numbers of the same calls
        (equal, 0, 1, clone3), (end, 0, 0, refuse | errno.ENOSYS),
        (equal, 0, 1, unshare), (end, 0, 0, refuse | errno.EPERM),
        (equal, 0, 1, ptrace), (end, 0, 0, refuse | errno.EPERM),
        (equal, 1, 0, clone), (end, 0, 0, allow),
        (load, 0, 0, 16), (any_bit, 0, 1, _CLONE_NEWUSER), (end, 0, 0, refuse | errno.EPERM), (end, 0, 0, allow),
    ]  # fmt: skip
    filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    program = struct.pack("HxxxxxxP", len(code), ctypes.addressof(filters))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(22, 2, program, 0, 0):  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        raise OSError(ctypes.get_errno(), "the kernel takes no seccomp filter")


def _read(size: int) -> bytes:
    """Exactly `size` bytes of standard input, and none of the program's."""
    data = b""
    while len(data) < size:
        part = os.read(0, size - len(data))
        if not part:
            raise EOFError(f"the job ends after {len(data)} of {size} bytes")
        data += part
    return data


if __name__ == "__main__":
    main()
