"""Numbers and lists in words, for the study's sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gradscope.analysis import Interval

__all__ = ["factor_text", "interval_text", "listed", "number_text"]


def number_text(x: float, digits: int = 2) -> str:
    """A number for prose: fixed digits, a true minus sign, and e-notation where it must."""
    if x != x:
        return "not known"
    if math.isinf(x):
        return "∞" if x > 0 else "−∞"
    if x == 0:
        return "0"
    if abs(x) >= 1e5 or abs(x) < 0.5 * 10**-digits:
        mantissa, exponent = f"{x:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}".replace("-", "−")
    return f"{x:.{digits}f}".replace("-", "−")


def interval_text(interval: Interval, digits: int = 2) -> str:
    """``estimate [low, high]``; the estimate alone where there is no interval."""
    estimate = number_text(interval.estimate, digits)
    if math.isnan(interval.low) or math.isnan(interval.high):
        return estimate
    return f"{estimate} [{number_text(interval.low, digits)}, {number_text(interval.high, digits)}]"


def listed(items: Sequence[object]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    words = [str(item) for item in items]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def factor_text(nats: float) -> str:
    """e^nats as a factor, also where that is out of a float's range."""
    if not math.isfinite(nats):
        return number_text(math.exp(nats) if nats < 0 else nats)
    if abs(nats) < 2:
        return number_text(math.exp(nats))
    if abs(nats) < math.log(1e5):
        return f"{math.exp(nats):.3g}"
    exponent = nats / math.log(10)
    mantissa, carry = f"{10 ** (exponent - math.floor(exponent)):.0e}".split("e")
    return f"{mantissa}e{math.floor(exponent) + int(carry)}".replace("-", "−")
