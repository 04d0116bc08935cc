"""Programs that a code reward must survive, and how each may end.

Each begins with `PRELUDE`; it calls `escaped` where it has done what it must not be able to do. Names in capitals are
filled in by the test: a secret file and its content outside, a port and an abstract socket where somebody listens.
"""

from __future__ import annotations

PRELUDE = """
import ctypes, os, signal, socket, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def escaped(what):
    sys.stderr.write(f"ESCAPED {what}\\n")
def attempt(what, action):
    try:
        value = action()
    except (OSError, ValueError, ImportError):
        return
    escaped(f"{what} {value}")
"""

PROGRAMS: dict[str, tuple[str, set[str]]] = {
    "fork bomb": ("while True: os.fork()", {"crashed"}),
    "fork bomb that does not give up": (
        "while True:\n    try: os.fork()\n    except OSError: pass",
        {"timeout", "crashed"},
    ),
    "thread bomb": (
        "while True: threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
        {"crashed"},
    ),
    "exec chain": ("os.execv(sys.executable, [sys.executable, *sys.argv])", {"timeout", "crashed"}),
    "memory at once": ("data = bytearray(64 << 30)", {"crashed"}),
    "memory bit by bit": ("data = []\nwhile True: data.append(bytes(1 << 20))", {"crashed"}),
    "memory as a number": ("print(9 ** 9 ** 9)", {"timeout", "crashed"}),
    "a full disk": (
        "for n in range(1000):\n    with open(f'{n}', 'wb') as file: file.write(bytes(8 << 20))",
        {"crashed"},
    ),
    "one large file": ("file = open('a', 'wb')\nwhile True: file.write(bytes(1 << 20))", {"crashed"}),
    "many small files": ("for n in range(10**7): open(f'{n}', 'w').close()", {"crashed", "timeout"}),
    "many open files": ("files = [open('/dev/null') for _ in range(5000)]", {"crashed"}),
    "memory files": (
        "fds = [os.memfd_create(str(n)) for n in range(40)]\nfor fd in fds: os.truncate(fd, 1 << 40)",
        {"crashed"},
    ),
    "endless output": ("while True: print('x' * 100_000)", {"output"}),
    "endless errors": ("while True: sys.stderr.write('x' * 100_000)", {"output"}),
    "endless loop": ("while True: pass", {"timeout"}),
    "endless sleep": ("time.sleep(10**6)", {"timeout"}),
    "endless sleep without streams": ("for fd in (0, 1, 2): os.close(fd)\ntime.sleep(10**6)", {"timeout"}),
    "a loop that ignores signals": (
        ("for n in signal.valid_signals() - {9, 19}:\n    signal.signal(n, signal.SIG_IGN)\nwhile True: pass"),
        {"timeout", "crashed"},
    ),
    "stopped": ("os.kill(os.getpid(), signal.SIGSTOP)", {"timeout"}),
    "a shell that loops": ("os.execv('/bin/sh', ['sh', '-c', 'while :; do :; done'])", {"timeout"}),
    "a connection to the internet": (
        "attempt('net', lambda: socket.create_connection(('192.0.2.1', 80), timeout=1))",
        {"wrong"},
    ),
    "a connection to this machine": (
        "attempt('port', lambda: socket.create_connection(('127.0.0.1', PORT), timeout=1))",
        {"wrong"},
    ),
    "an abstract socket": (
        "attempt('socket', lambda: socket.socket(socket.AF_UNIX).connect('\\0SOCKET'))",
        {"wrong"},
    ),
    "a datagram": (
        "attempt('udp', lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53)))",
        {"wrong"},
    ),
    "the run directory": ("attempt('read', lambda: open('SECRET_FILE').read())", {"wrong"}),
    "every file there is": (
        (
            "for folder, folders, names in os.walk('/'):\n    if folder == '/usr': folders.clear()\n"
            "    if 'SECRET_NAME' in names: escaped(folder)"
        ),
        {"wrong"},
    ),
    "a symbolic link": (
        (
            "os.symlink('/', 'root')\nattempt('link', lambda: open('root/SECRET_FILE').read())\n"
            "os.symlink('../../../../../../..', 'up')\nattempt('up', lambda: open('up/SECRET_FILE').read())"
        ),
        {"wrong"},
    ),
    "the environment of others": (
        (
            "for process in os.listdir('/proc'):\n"
            "    try: text = open(f'/proc/{process}/environ').read()\n"
            "    except OSError: continue\n"
            "    if 'SECRET_CONTENT' in text: escaped('environment')"
        ),
        {"wrong"},
    ),
    "the root of others": (
        (
            "for process in os.listdir('/proc'):\n"
            "    for way in ('root', 'cwd'):\n"
            "        if os.path.exists(f'/proc/{process}/{way}/SECRET_FILE'): escaped(way)"
        ),
        {"wrong"},
    ),
    "a signal to the parent": ("os.kill(os.getppid(), signal.SIGKILL)", {"wrong", "crashed"}),
    "a signal to everybody": ("os.kill(-1, signal.SIGKILL)", {"wrong", "crashed"}),
    "signals to each number": (
        (
            "for n in range(1, 100_000):\n    if n != os.getpid():\n        try: os.kill(n, signal.SIGKILL)\n"
            "        except OSError: pass"
        ),
        {"wrong", "crashed"},
    ),
    "zombies": (
        "while True:\n    if os.fork() == 0: os._exit(0)",
        {"crashed"},
    ),
    "a daemon": (
        "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(10**6)\n    os._exit(0)",
        {"wrong"},
    ),
    "a daemon that holds the streams": (
        "subprocess.Popen(['/bin/sh', '-c', 'while :; do sleep 1; echo x; done'], start_new_session=True)",
        {"wrong"},
    ),
    "writing everywhere": (
        (
            "for folder, folders, _ in os.walk('/'):\n    if folder in ('/usr', '/proc'): folders.clear()\n"
            "    if not folder.startswith('/tmp'): attempt('write', lambda: open(folder + '/x', 'w'))"
        ),
        {"wrong"},
    ),
    "writing to the kernel": (
        (
            "for name in ('/proc/sys/kernel/hostname', '/proc/sys/vm/overcommit_memory', '/proc/sysrq-trigger'):\n"
            "    attempt(name, lambda: open(name, 'w').write('1'))"
        ),
        {"wrong"},
    ),
    "mounts": (
        (
            "for kind in (b'tmpfs', b'proc', b'sysfs'):\n"
            "    if libc.mount(kind, b'/tmp', kind, 0, None) == 0: escaped('mount')\n"
            "if libc.umount2(b'/tmp', 2) == 0: escaped('umount')\n"
            "if libc.mount(b'none', b'/usr', None, 32 | 4096, None) == 0: escaped('remount')"
        ),
        {"wrong"},
    ),
    "more rights": (
        (
            "for name, arguments in (('setuid', (0,)), ('setgid', (0,)), ('chroot', ('/',)), ('nice', (-10,))):\n"
            "    before = os.geteuid() if name == 'setuid' else os.getegid()\n"
            "    if before: attempt(name, lambda: getattr(os, name)(*arguments))\n"
            "if libc.sethostname(b'mine', 4) == 0: escaped('hostname')"
        ),
        {"wrong"},
    ),
    "more than the limits": (
        (
            "import resource\n"
            "for kind in (resource.RLIMIT_NPROC, resource.RLIMIT_AS, resource.RLIMIT_CPU):\n"
            "    attempt('limit', lambda: resource.setrlimit(kind, (10**12, 10**12)))"
        ),
        {"wrong"},
    ),
    "devices": (
        (
            "for name in ('/dev/mem', '/dev/sda', '/dev/vda', '/dev/kmsg', '/dev/tty', '/dev/fuse'):\n"
            "    attempt(name, lambda: open(name, 'rb'))\n"
            "attempt('mknod', lambda: os.mknod('disk', 0o60600, os.makedev(8, 0)))"
        ),
        {"wrong"},
    ),
    "namespaces of its own": (
        (
            "if libc.unshare(0x10000000) == 0: escaped('unshare')\n"
            "if subprocess.run(['unshare', '--user', 'true']).returncode == 0: escaped('unshare')\n"
            "if libc.syscall(435, None, 0) == 0 or ctypes.get_errno() != 38: escaped('clone3')"
        ),
        {"wrong"},
    ),
    "tracing the first process": ("if libc.ptrace(16, 1, 0, 0) == 0: escaped('ptrace')", {"wrong"}),
    "inherited descriptors": (
        "for fd in range(3, 64):\n    attempt('fd', lambda: os.write(fd, b'x'))",
        {"wrong"},
    ),
    "shared memory": ("attempt('shm', lambda: open('/dev/shm/x', 'wb').write(bytes(1 << 20)))", {"wrong"}),
    "a crash of the interpreter": ("ctypes.string_at(0)", {"crashed"}),
    "endless recursion": ("sys.setrecursionlimit(10**9)\ndef f(): f()\nf()", {"crashed", "timeout"}),
    "an abort": ("os.abort()", {"crashed"}),
    "not a program": ("def (\0", {"crashed"}),
}

ASSERTING: dict[str, tuple[str, set[str]]] = {
    "leaves before the tests": ("sys.exit(0)", {"wrong"}),
    "leaves at once": ("os._exit(0)", {"wrong"}),
    "leaves with its own text as output": ("print(open('main.py').read())\nos._exit(0)", {"wrong"}),
    "no more assertions": (
        "import builtins\nclass AssertionError(Exception): pass\nbuiltins.AssertionError = AssertionError",
        {"wrong", "crashed"},
    ),
    "leaves when it is tested": ("def add(a, b): os._exit(0)", {"wrong"}),
}
"""Judged by `assert add(1, 2) == 3`."""
