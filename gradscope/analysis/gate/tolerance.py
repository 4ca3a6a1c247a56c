"""The smallest change worth failing for, per kind of feature: ``flow:20%,delta:.5nat``."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from gradscope.errors import GateError

__all__ = ["DEFAULTS", "EFFECTIVE_DEPTH", "Tolerance", "parse_tolerance"]

#: Nats, per kind; ``mean rms`` is that of the mean of ``rms`` over blocks.
DEFAULTS: Final[Mapping[str, float]] = MappingProxyType(
    {
        "flow": 0.05,
        "act": 0.05,
        "upd": 0.10,
        "gup": 0.10,
        "endpoint": 0.15,
        "delta": 0.15,
        "param_grad": 0.20,
        "rms": 0.03,
        "mean": 0.05,
        "mean rms": 0.02,
    }
)
#: A quantity of the whole model, compared only where a tolerance is given for it.
EFFECTIVE_DEPTH: Final = "effective_depth"

_ITEM: Final = re.compile(r"\s*([a-z_]+(?: rms)?)\s*:\s*(\d*\.?\d+(?:e-?\d+)?)\s*(%|nats?)\s*")


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Nats per kind, those that the user gave.

    Attributes:
        given: kind → nats; the others have `DEFAULTS`.
    """

    given: Mapping[str, float]

    def of(self, kind: str, role: str = "") -> float:
        """For other seeds: the given one, or the default."""
        key = "mean rms" if kind == "mean" and role.startswith("mean rms") else kind
        return self.given.get(key, self.given.get(kind, DEFAULTS[key]))

    def same_seeds(self, kind: str, default: float) -> float:
        """For the same seeds, where noise is only numerical: the given one, or ``default``."""
        return self.given.get(kind, default)


def parse_tolerance(text: str | None) -> Tolerance:
    """Read ``flow:20%,delta:.5nat,effective_depth:10%``.

    ``20%`` is ln 1.2 nats: a factor of 1.2 either way; ``.5nat`` is half a nat, a factor of 1.65.

    Raises:
        GateError: another form, a kind that does not exist or is there twice, or no finite change.
    """
    given: dict[str, float] = {}
    for item in (text or "").split(","):
        if not item.strip():
            continue
        match = _ITEM.fullmatch(item)
        known = [*DEFAULTS, EFFECTIVE_DEPTH]
        if not match or match[1] not in known:
            raise GateError(
                f"tolerance {item.strip()!r}: write kind:20% or kind:.5nat, separated by commas, with a "
                f"kind out of {', '.join(known)}."
            )
        if match[1] in given:
            raise GateError(f"tolerance {item.strip()!r}: {match[1]} has one already: give one each.")
        number = float(match[2])
        nats = math.log1p(number / 100) if match[3] == "%" else number
        if not math.isfinite(nats):
            raise GateError(f"tolerance {item.strip()!r}: no change is that large. Leave the kind out.")
        given[match[1]] = nats
    return Tolerance(MappingProxyType(given))
