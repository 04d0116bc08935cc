"""The real store and scheduler under a virtual clock, with models of engine, learner and answer lengths.

`pmdflow simulate` plans with it, and the scheduler's properties are tested on it.
"""

from pmdflow.run.simulation.models import EngineModel, LearnerModel, Lengths, LognormalLengths, RecordedLengths
from pmdflow.run.simulation.report import SimulatedIteration, SimulationReport
from pmdflow.run.simulation.settings import SimulationSettings
from pmdflow.run.simulation.world import Simulation

__all__ = [
    "EngineModel",
    "LearnerModel",
    "Lengths",
    "LognormalLengths",
    "RecordedLengths",
    "SimulatedIteration",
    "Simulation",
    "SimulationReport",
    "SimulationSettings",
]
