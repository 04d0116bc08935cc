"""Failures without a success between them: so many end the run with the first one's message."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pmdflow.errors import PmdflowError

if TYPE_CHECKING:
    from pmdflow.config.agents import AgentsConfig
    from pmdflow.config.schema import EnvironmentConfig


@dataclass(slots=True)
class InARow:
    """What failed since something last went well."""

    what: str
    """What failed, and how, as a message says it after their number."""
    most: int | None
    """Value of `setting`; None: they are not counted."""
    setting: str
    remedy: str
    _num: int = field(default=0, init=False)
    _first: str = field(default="", init=False)

    @classmethod
    def of_environment(cls, config: EnvironmentConfig | None) -> InARow:
        """Calls of environments."""
        most, name = (None, "") if config is None else (config.max_failures_in_a_row, config.factory)
        what = f"calls of environment.factory {name} failed in a row"
        return cls(what, most, "environment.max_failures_in_a_row", "mend the environment")

    @classmethod
    def of_programs(cls, config: AgentsConfig) -> InARow:
        """Agent programs that ended without having asked for a turn."""
        name = config.program or " ".join(config.command or ())
        what = f"agent programs ({name}) ended in a row without a request"
        return cls(what, config.max_failures_in_a_row, "agents.max_failures_in_a_row", "mend the program")

    def note(self, problem: str) -> None:
        """One more has come to its end; the problem of one that went well is empty.

        Raises:
            PmdflowError: too many have failed.
        """
        if not problem:
            self._num = 0
            return
        self._num += 1
        self._first = problem if self._num == 1 else self._first
        if self.most is not None and self._num >= self.most:
            raise PmdflowError(
                f"{self._num} {self.what} ({self.setting}); the first: {self._first}",
                hint=f"{self.remedy}; what is stored stays, and `pmdflow up` goes on",
            )
