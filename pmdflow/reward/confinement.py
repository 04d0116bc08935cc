"""Ways to confine a program: how each begins its command line, which the sandbox's entry ends.

Both ways make mounts of their own (this Python and `/usr` read-only, a small `/tmp`, `/proc` of the inside, nothing
else), process ids of their own, and a network without a way out. They need user namespaces, or root. A process of root
takes a user id that nobody has: the limit on processes counts by user id, and does not hold for root.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PYTHON = os.path.realpath(sys.executable)
"""The interpreter of the inside: that of this environment, without its packages."""
_FIRST_USER = 1_000_000_000
"""Above every user id that is given out."""
_HOME = "/tmp"  # noqa: S108 - that of the inside
_LOOPBACK = "import fcntl, socket, struct; fcntl.ioctl(socket.socket(), 0x8914, struct.pack('16sh14x', b'lo', 0x41))"
"""Brings it up (linux/sockios.h, SIOCSIFFLAGS), which Bubblewrap does itself."""
_DEVICES = ("null", "zero", "random", "urandom")


@dataclass(frozen=True, slots=True, kw_only=True)
class Confinement:
    """One way, as the beginning of a command line."""

    name: str
    argv: tuple[str, ...]
    user: int = 0
    """User id that the entry takes; 0: it stays what it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """What a program sees of the machine besides the system."""

    read: tuple[Path, ...] = ()
    """Files and folders, read-only."""
    hide: tuple[Path, ...] = ()
    """Folders below those of `read` that are empty inside."""
    write: tuple[tuple[Path, str], ...] = ()
    """Files, each with its name inside."""
    loopback: bool = False
    """It reaches its own addresses, as those of one machine reach each other; still nobody else's."""

    def folders(self) -> list[Path]:
        """What of `read` is to be mounted: what holds the inside's own mounts, or is in another one of them, is not."""
        own = [Path(name) for name in (_HOME, "/proc", "/dev", "/usr", "/sys")]
        real = dict.fromkeys(path.resolve() for path in self.read if path.exists())
        apart = [path for path in real if not any(mount.is_relative_to(path) for mount in own)]
        apart = [path for path in apart if not any(path.is_relative_to(system) for system in _system())]
        return [path for path in apart if not any(path != other and path.is_relative_to(other) for other in apart)]

    def hidden(self) -> list[Path]:
        """What of `hide` would be seen."""
        seen = self.folders()
        real = dict.fromkeys(path.resolve() for path in self.hide)
        return [path for path in real if any(path.is_relative_to(folder) and path != folder for folder in seen)]


_CLOSED = Opening()

UNCONFINED = Confinement(name="none", argv=("setpriv", "--no-new-privs", "--pdeathsig", "KILL"))
"""No walls, only limits: for programs that are trusted."""


def confinements(*, disk_bytes: int, opening: Opening = _CLOSED) -> list[Confinement]:
    """What is installed on this machine, best first; whether a way works, only trying shows."""
    ways = []
    for name, make in (("bwrap", _bubblewrap), ("unshare", _unshare)):
        if shutil.which(name) is not None:
            if os.geteuid() == 0:
                ways.append(
                    Confinement(name=f"{name} as root", argv=make(disk_bytes, True, opening), user=_free_user())
                )
            ways.append(Confinement(name=name, argv=make(disk_bytes, False, opening)))
    return ways


def _free_user() -> int:
    """One that no other worker of this machine takes."""
    return _FIRST_USER + os.getpid()


def _bubblewrap(disk_bytes: int, as_root: bool, opening: Opening) -> tuple[str, ...]:
    rights = ["--cap-drop", "ALL"]
    rights += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"] if as_root else ["--unshare-user", "--uid", "1000"]
    mounts = [word for path in _system() for word in _bubblewrap_mount(path)]
    more = [word for path in opening.folders() for word in _bubblewrap_mount(path)]
    more += [word for path in opening.hidden() for word in ("--tmpfs", str(path), "--remount-ro", str(path))]
    more += [word for path, inside in opening.write for word in ("--bind", str(path), inside)]
    spaces = [f"--unshare-{space}" for space in ("ipc", "pid", "net", "uts", "cgroup-try")]
    return (
        "bwrap", *spaces, *rights, "--die-with-parent", "--new-session", "--clearenv", *mounts,
        "--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev",
        "--size", str(disk_bytes), "--perms", "1777", "--tmpfs", _HOME, *more,
        "--remount-ro", "/", "--chdir", _HOME, "--",
    )  # fmt: skip


def _bubblewrap_mount(path: Path) -> Sequence[str]:
    if path.is_symlink():
        return ("--symlink", os.readlink(path), str(path))
    # Bubblewrap makes parents as private as those outside are.
    parents = [word for parent in _parents(path) for word in ("--perms", "0755", "--dir", str(parent))]
    return (*parents, "--ro-bind", str(path), str(path))


def _unshare(disk_bytes: int, as_root: bool, opening: Opening) -> tuple[str, ...]:
    """The same with the tools of util-linux; `/sys` serves as the place where the new root is put together."""
    script = ["set -e", "mount -t tmpfs -o size=1M,mode=755 tmpfs /sys"]
    for path in _system():
        if path.is_symlink():
            script.append(f"ln -s {shlex.quote(os.readlink(path))} /sys{path}")
        else:
            script += _unshare_mount(path)
    script.append(f"mkdir /sys/proc /sys/dev /sys{_HOME}; mount -t proc -o nosuid,nodev,noexec proc /sys/proc")
    script += [f": > /sys/dev/{name}; mount --bind /dev/{name} /sys/dev/{name}" for name in _DEVICES]
    script += [
        f"mount -t tmpfs -o nosuid,nodev,size={disk_bytes},mode=1777 tmpfs /sys{_HOME}",
        *(line for path in opening.folders() for line in _unshare_mount(path)),
        *(f"mount -t tmpfs -o ro,size=1 tmpfs {shlex.quote(f'/sys{path}')}" for path in opening.hidden()),
        *(
            f": > /sys{inside}; mount --bind {shlex.quote(str(path))} /sys{inside}; "
            f"mount -o remount,bind,nosuid,nodev,noexec /sys{inside}"
            for path, inside in opening.write
        ),
        *([f"{shlex.quote(PYTHON)} -I -S -c {shlex.quote(_LOOPBACK)}"] if opening.loopback else []),
        f"cd /sys; pivot_root . .; umount -l .; mount -o remount,bind,ro /; cd {_HOME}",
        # Not replaced by the program: it collects orphans, and the kernel spares a first process many signals.
        f'setpriv --no-new-privs --inh-caps=-all --bounding-set=-all{",+setuid,+setgid" if as_root else ""} "$@"',
    ]
    user = () if as_root else ("--user", "--map-root-user")
    return (
        "setpriv", "--pdeathsig", "KILL", "unshare", *user, "--mount", "--pid", "--net", "--ipc", "--uts", "--cgroup",
        "--fork", "--kill-child", "--propagation", "private", "sh", "-c", "\n".join(script), "sh",
    )  # fmt: skip


def _unshare_mount(path: Path) -> list[str]:
    inside = shlex.quote(f"/sys{path}")
    make = f"mkdir -p {inside}" if path.is_dir() else f"mkdir -p {shlex.quote(f'/sys{path.parent}')}; : > {inside}"
    return [
        f"{make}; mount --bind {shlex.quote(str(path))} {inside}",
        f"mount -o remount,bind,ro,nosuid,nodev {inside}",
    ]


def _system() -> list[Path]:
    """What a Python program needs of the machine: the system's libraries, and the interpreter if it is elsewhere."""
    paths = [Path(name) for name in ("/usr", "/lib", "/lib64", "/bin") if os.path.lexists(name)]
    base = Path(sys.base_prefix).resolve()
    if not base.is_relative_to("/usr"):
        paths.append(base)
    return paths


def _parents(path: Path) -> list[Path]:
    return [parent for parent in reversed(path.parents) if parent != Path("/")]
