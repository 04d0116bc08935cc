"""First code inside a sandbox: takes the job from standard input, gives up every right, and becomes the program.

The sandbox's own interpreter gets it as text, so it imports nothing but the standard library. Arguments: the file
descriptor that says the sandbox holds, and the user id to become (0: stay). Standard input begins with the length of
the job in ten digits and the job in JSON, `{"argv", "files", "limits"}`; what follows it is the program's.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from typing import Any

RESOURCES = {
    "memory_bytes": resource.RLIMIT_AS,
    "processes": resource.RLIMIT_NPROC,
    "open_files": resource.RLIMIT_NOFILE,
    "disk_bytes": resource.RLIMIT_FSIZE,
}


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
    os.set_inheritable(holds, False)
    os.write(holds, b"1")
    os.execve(job["argv"][0], job["argv"], {"HOME": os.getcwd(), "PATH": "/usr/bin:/bin"})  # noqa: S606


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
