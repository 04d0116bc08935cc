"""Settings of all tests."""

import os

from hypothesis import settings

# Tests start hundreds of processes; each would compile torch, Ray and transformers anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# How long an example takes is the machine's business.
settings.register_profile("pmdflow", deadline=None)
settings.load_profile("pmdflow")
