"""Output that goes away takes nothing with it."""

from __future__ import annotations

import contextlib
import io
import os
import select
import subprocess
import sys

import pytest

from pmdflow.metrics.lasting import lasting

SCRIPT = """
import sys
from pmdflow.metrics.lasting import lasting
out = lasting(sys.stdout)
for _ in range(3):
    out.write("line\\n" * 10_000)
    out.flush()
sys.stderr.write("went on")
"""


def test_what_is_there_is_written() -> None:
    stream = io.StringIO()
    out = lasting(stream)
    assert out.write("text") == 4
    out.flush()
    assert (stream.getvalue(), out.isatty()) == ("text", False)
    stream.close()
    assert out.write("more") == 4


@pytest.mark.parametrize("where", ["full", "reader gone"])
def test_a_process_goes_on_and_ends_well_without_its_output(where: str) -> None:
    if where == "full":
        with open("/dev/full", "wb") as out:
            done = subprocess.run([sys.executable, "-c", SCRIPT], stdout=out, stderr=subprocess.PIPE, check=False)
    else:
        reading, writing = os.pipe()
        os.close(reading)
        done = subprocess.run([sys.executable, "-c", SCRIPT], stdout=writing, stderr=subprocess.PIPE, check=False)
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"went on")


def test_a_reader_that_stands_still_is_not_waited_for_and_hears_what_comes_when_it_goes_on() -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as reader, os.fdopen(writing, "w") as stream:
        os.set_blocking(writing, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writing, b"x" * 4096)
        os.set_blocking(writing, True)
        out = lasting(stream)
        for _ in range(1000):
            out.write("nobody hears this\n" * 1000)
            out.flush()
        while select.select([reader], [], [], 0)[0]:
            assert set(os.read(reading, 1 << 20)) == set(b"x")
        out.write("heard\n")
        assert reader.readline() == b"heard\n"
