"""Credit functions of the methods of the third seed, by name; each is in the file of its method. NumPy, float64."""

from pmdflow.learner.methods.distillation import opd, vopd
from pmdflow.learner.methods.gdpo import gdpo
from pmdflow.learner.methods.gigpo import gigpo
from pmdflow.learner.methods.negative import negative_reinforcement
from pmdflow.learner.methods.opefo import opefo
from pmdflow.learner.methods.ucpo import ucpo

__all__ = ["gdpo", "gigpo", "negative_reinforcement", "opd", "opefo", "ucpo", "vopd"]
