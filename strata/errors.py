"""Errors meant for people, each with the exit code that the command line promises."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


class StrataError(Exception):
    """An error whose message is the whole story: printed without a traceback, then exit with `exit_code`."""

    exit_code = 1


@dataclasses.dataclass(frozen=True)
class Problem:
    """One mistake in a config: where it is, what is there, and what was expected."""

    path: str  # full dotted path, e.g. "optimizer.direction.learning_rate"
    message: str
    value: object = dataclasses.field(default=None, compare=False)
    has_value: bool = True
    defined_in: str = ""  # "file:line" that defines the field or the class

    def __str__(self) -> str:
        head = f"{self.path} = {self.value!r}" if self.has_value else self.path
        tail = f"\n      (defined in {self.defined_in})" if self.defined_in else ""
        return f"{head}\n      {self.message}{tail}"


class ConfigError(StrataError):
    """The config or the command line is wrong. Holds every problem found, not only the first."""

    exit_code = 2

    def __init__(self, problems: Sequence[Problem] | str, source: str = ""):
        self.problems = [Problem("", problems, has_value=False)] if isinstance(problems, str) else list(problems)
        if isinstance(problems, str):
            text = problems
        else:
            count = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}"
            head = f"{count} in {source}" if source else f"{count} in the config"
            text = "\n".join([f"{head}:", *(f"  {problem}" for problem in self.problems)])
        super().__init__(text)


class Diverged(StrataError):
    """Training produced a non-finite loss and the policy was to stop."""

    exit_code = 3


class DataError(StrataError):
    """Data is missing, empty, truncated or damaged. The message names the file."""

    exit_code = 4


class Preempted(StrataError):
    """Stopped by a signal after saving; starting again goes on from there."""

    exit_code = 75
