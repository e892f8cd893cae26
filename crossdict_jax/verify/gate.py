"""What a gate is: known answers, each a number with the bound that it must keep."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

RELATIONS = {">=": operator.ge, "<=": operator.le, "==": operator.eq}


@dataclass(frozen=True)
class Check:
    """One number of a gate.

    Attributes:
      what: the number in words.
      value: None where it could not be had, which keeps no bound.
      relation: one of RELATIONS; "" for a number that is shown and bounds nothing.
      bound: what the value is compared with.
    """

    what: str
    value: float | None
    relation: str = ""
    bound: float | None = None

    @property
    def passed(self) -> bool:
        if not self.relation:
            return True
        known = self.value is not None and not math.isnan(self.value)
        return known and bool(RELATIONS[self.relation](self.value, self.bound))


@dataclass(frozen=True)
class Gate:
    """A gate's outcome: all its numbers.

    Attributes:
      name: G1 to G10.
      what: what must come out, in words.
      checks: at least one of them with a bound.
      note: what a reader should know beside the numbers.
    """

    name: str
    what: str
    checks: tuple[Check, ...]
    note: str = ""

    @property
    def passed(self) -> bool:
        return any(c.relation for c in self.checks) and all(c.passed for c in self.checks)

    def row(self) -> dict[str, Any]:
        """Returns the gate as JSON values, its bounds with it."""
        checks = [vars(check) | {"passed": check.passed} for check in self.checks]
        row = {"gate": self.name, "what": self.what, "passed": self.passed}
        return row | {"checks": checks, "note": self.note}


def at_least(what: str, value: float | None, bound: float) -> Check:
    """Returns the check that ``value >= bound``."""
    return Check(what, _number(value), ">=", bound)


def at_most(what: str, value: float | None, bound: float) -> Check:
    """Returns the check that ``value <= bound``."""
    return Check(what, _number(value), "<=", bound)


def equal(what: str, value: float | None, bound: float) -> Check:
    """Returns the check that ``value == bound``, exactly."""
    return Check(what, _number(value), "==", bound)


def shown(what: str, value: float | None) -> Check:
    """Returns a number that stands in the table without a bound."""
    return Check(what, _number(value))


def _number(value) -> float | None:
    return None if value is None else float(value)
