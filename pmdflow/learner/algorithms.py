"""The table of algorithms: a name, what gives credit, and the loss of one micro-batch.

A new algorithm is pure functions and a line in `ALGORITHMS`; one of your own is named in the config by import path,
`package.module:name`, and is an `Algorithm`.
"""

from __future__ import annotations

from pmdflow.config.combinations import ALGORITHM_NAMES
from pmdflow.config.imports import load_named
from pmdflow.config.schema import LearnerConfig
from pmdflow.learner import advantage, losses, objective
from pmdflow.learner.algorithm import Algorithm as Algorithm
from pmdflow.learner.algorithm import Terms as Terms
from pmdflow.learner.algorithm import of_rewards as of_rewards
from pmdflow.learner.methods.distillation import OPD, VOPD
from pmdflow.learner.methods.gdpo import GDPO
from pmdflow.learner.methods.gigpo import GIGPO
from pmdflow.learner.methods.negative import A_NSR
from pmdflow.learner.methods.opefo import OPEFO
from pmdflow.learner.methods.ucpo import UCPO
from pmdflow.learner.view import ClaimView as ClaimView
from pmdflow.learner.view import Credit as Credit
from pmdflow.types import Float64, Int64


def _mean(rewards: Float64, groups: Int64, learner: LearnerConfig) -> Float64:
    return advantage.pmd_mean(rewards, groups, leave_one_out=learner.leave_one_out)


def _partition(rewards: Float64, groups: Int64, learner: LearnerConfig) -> Float64:
    return advantage.pmd_partition(
        rewards, groups, tau=learner.tau, leave_one_out=learner.leave_one_out, floor=learner.partition_floor
    )


def _boltzmann(rewards: Float64, groups: Int64, learner: LearnerConfig) -> Float64:
    return advantage.boltzmann_weights(rewards, groups, tau=learner.tau)


def _normalized(rewards: Float64, groups: Int64, learner: LearnerConfig) -> Float64:
    return advantage.grpo(rewards, groups)


ALGORITHMS: dict[str, Algorithm] = {
    "pmd_mean": Algorithm(credit=of_rewards(_mean), loss=losses.pmd),
    "pmd_partition": Algorithm(credit=of_rewards(_partition), loss=losses.pmd),
    "boltzmann_pmd": Algorithm(credit=of_rewards(_partition, _boltzmann), loss=losses.pmd),
    "weighted_sft": Algorithm(credit=of_rewards(_mean, _boltzmann), loss=losses.weighted_sft),
    "token_pmd": Algorithm(
        credit=of_rewards(_mean),
        loss=losses.token_pmd,
        clipped=losses.clipped_count("token-both-sides", losses.TOKEN_BAND, logarithmic=True),
        mean_over="tokens",
    ),
    "ctpo": losses.ratio_clipping(of_rewards(_normalized), objective.ctpo_loss, "prefix", (0.2, 0.2), logarithmic=True),
    "grpo": losses.ratio_clipping(of_rewards(_normalized), objective.grpo_loss, "token", (0.2, 0.2)),
    "gspo": losses.ratio_clipping(of_rewards(_normalized), objective.gspo_loss, "sequence", (3e-4, 4e-4)),
    "ucpo": UCPO,
    "a_nsr": A_NSR,
    "gdpo": GDPO,
    "opefo": OPEFO,
    "gigpo": GIGPO,
    "opd": OPD,
    "vopd": VOPD,
}
"""Names that `learner.algorithm` knows."""
assert tuple(ALGORITHMS) == ALGORITHM_NAMES


def find_algorithm(name: str) -> Algorithm:
    """The algorithm of a name in the table, or of an import path `package.module:name`.

    Raises:
        ValueError: there is none, or what the path names is not an `Algorithm`.
    """
    if ":" not in name:
        if name not in ALGORITHMS:
            known = ", ".join(ALGORITHMS)
            raise ValueError(
                f"learner.algorithm is {name!r}: use one of {known}, or an import path package.module:name"
            )
        return ALGORITHMS[name]
    try:
        found = load_named(name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"learner.algorithm {name!r} cannot be imported: {error}") from error
    if not isinstance(found, Algorithm):
        raise ValueError(f"learner.algorithm {name!r} is a {type(found).__name__}; make it an Algorithm")
    return found
