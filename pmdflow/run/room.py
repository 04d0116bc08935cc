"""What a run has to run on: its GPUs, the size of its model, what `auto` becomes there, and whether it fits."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from pmdflow.config.gpus import Gpus, local_gpus, planned_gpus
from pmdflow.config.memory import Footprint
from pmdflow.config.plan import Plan, make_plan
from pmdflow.config.schema import Config
from pmdflow.config.settle import settle
from pmdflow.data.inputs import Inputs
from pmdflow.errors import LaunchError
from pmdflow.run.cluster import ask_cluster


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """The GPUs of a run, and its model."""

    gpus: Gpus | None
    model: Footprint | None
    """None: its code cannot be measured, or nobody needs the size."""
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, inputs: Inputs, *, dry: bool) -> Room:
        """Look at this machine or the cluster; a dry run goes on without one, and measures the model anyway.

        Raises:
            LaunchError: no Ray answers at `cluster.address`.
        """
        config, notes = inputs.config, []
        gpus = planned_gpus(config) if dry else real_gpus(config)
        if dry and gpus is None and config.cluster.address != "local":
            try:
                gpus = real_gpus(config)
            except LaunchError as error:
                notes.append(f"{error}: the plan is that of processors")
            notes.append("the memory of the cluster's GPUs is not known; state it for a plan: cluster.gpus=8x80GiB")
        has_size = gpus is not None and gpus.bytes_each is not None
        model = _measure(inputs, settle(config, gpus=gpus)) if has_size or dry else None
        return cls(gpus=gpus, model=model, notes=tuple(notes))

    def settled(self, inputs: Inputs) -> Inputs:
        """Decide whatever is `auto`."""
        is_sized = self.gpus is not None and self.gpus.bytes_each is not None
        return replace(inputs, config=settle(inputs.config, gpus=self.gpus, model=self.model if is_sized else None))

    def plan(self, config: Config) -> Plan:
        """The plan of a settled configuration.

        Raises:
            LaunchError: it cannot fit; says how much which role needs, and what would fit.
        """
        is_here = config.cluster.address == "local" and config.cluster.gpus is None
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if is_here else None
        plan = make_plan(config, model=self.model, gpus=self.gpus, host_bytes=machine)
        if plan.memory is not None and plan.memory.problems:
            texts, _, remedies = zip(*(problem.rpartition("; ") for problem in plan.memory.problems), strict=True)
            raise LaunchError("\n".join(texts), hint="\n".join(remedies))
        return plan


def real_gpus(config: Config) -> Gpus | None:
    """Those that a run has, whatever `cluster.gpus` states but their memory, which Ray does not tell.

    Raises:
        LaunchError: no Ray answers at `cluster.address`.
    """
    if config.cluster.address == "local":
        return local_gpus()
    stated, count = planned_gpus(config), ask_cluster(config.cluster.address).gpus
    each = None if stated is None else stated.bytes_each
    return Gpus(count=count, bytes_each=each, source="of the Ray cluster") if count else None


def _measure(inputs: Inputs, config: Config) -> Footprint | None:
    from pmdflow.learner.footprint import measure_apart, measure_footprint  # torch takes seconds

    measure = measure_footprint if local_gpus() is None else measure_apart
    learner = config.learner

    def measured(folder: Path | str) -> Footprint | None:
        try:
            return measure(folder, dtype=config.model.compute, packing=learner.packing)
        except Exception:  # a family's code can fail in any way; that it can be trained was judged before
            return None

    model = measured(inputs.base)
    if model is None or learner.teacher is None:
        return model
    return replace(model, teacher=measured(learner.teacher))
