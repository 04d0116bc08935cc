"""Asynchronous RL post-training of language models by online policy mirror descent."""

import os

# Ray reads these when it is first imported, wherever that is.
# It would start every worker through `uv run` again, in a copy of the project.
os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# Telemetry calls may still be on their way to an actor that has been stopped on purpose.
os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
# Progress bars of libraries in actors would only fill the logs.
os.environ.setdefault("TQDM_DISABLE", "1")
