"""Settings of all tests."""

import os
import signal
import sys

from hypothesis import settings

# Most tests start processes that import torch: without byte code each of them compiles it again, for half a minute.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Under `nohup` SIGHUP is ignored, and pmdflow respects that: what it does with the signal could not be seen.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# How long an example takes is the machine's business.
settings.register_profile("pmdflow", deadline=None)
settings.load_profile("pmdflow")
