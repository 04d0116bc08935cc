"""Settings of all tests."""

from hypothesis import settings

# How long an example takes is the machine's business.
settings.register_profile("pmdflow", deadline=None)
settings.load_profile("pmdflow")
