"""The Ray cluster that a run joins, asked before anything starts: whether it is there, and what it has."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass

from pmdflow.errors import LaunchError

RAY_ANSWER_S = 25.0
"""A Ray that is to be joined answers within this time, that for importing its client included."""
_UNKNOWN_HERE = (
    "Ray's nodes need the same token: copy ~/.ray/auth_token of the head to every node, or set RAY_AUTH_MODE=disabled "
    "for every `ray start` and for pmdflow"
)
_QUESTION = """
import json, sys, ray
ray.init(sys.argv[1], log_to_driver=False)
print(json.dumps({"gpus": int(ray.cluster_resources().get("GPU", 0))}))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterFacts:
    """What a running Ray says of itself."""

    gpus: int
    """On all nodes."""


def ask_cluster(address: str) -> ClusterFacts:
    """Ask in a process of its own, which can be killed: Ray's client waits minutes for an address that is silent.

    Raises:
        LaunchError: nobody answers in time, or no Ray of this version.
    """
    hint = "start one there (`ray start --head`), or set cluster.address to local"
    try:
        done = subprocess.run(
            [sys.executable, "-c", _QUESTION, address], stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=RAY_ANSWER_S, check=False, start_new_session=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        why = f"no Ray has answered within {RAY_ANSWER_S:g} s"
        raise LaunchError(f"cluster.address is {address!r}: {why}", hint=hint) from None
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"Ray's client ended with {done.returncode}"]
        needs_token = any("authentication" in line.lower() for line in said)
        raise LaunchError(f"cluster.address is {address!r}: {said[-1]}", hint=_UNKNOWN_HERE if needs_token else hint)
    return ClusterFacts(**json.loads(done.stdout.splitlines()[-1]))
