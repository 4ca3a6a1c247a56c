"""The smallest numbers of the dtypes that networks compute in."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

__all__ = ["SMALLEST", "dtypes_inside", "dtypes_of"]

#: dtype → its smallest subnormal and smallest normal number (IEEE 754; bfloat16 has float32's exponent
#: and 7 fraction bits).
SMALLEST: Final[Mapping[str, tuple[float, float]]] = MappingProxyType(
    {
        "float64": (2.0**-1074, 2.0**-1022),
        "float32": (2.0**-149, 2.0**-126),
        "bfloat16": (2.0**-133, 2.0**-126),
        "float16": (2.0**-24, 2.0**-14),
    }
)


def dtypes_of(header: Mapping[str, Any]) -> tuple[str, ...]:
    """The dtypes that activations came in, by a Record's header; the parameters' where it has none."""
    words = str(header.get("activation_dtype") or header.get("dtype") or "")
    return tuple(word for word in words.split(", ") if word)


def dtypes_inside(header: Mapping[str, Any]) -> tuple[str, ...]:
    """Every dtype that a value may have passed through, by a Record's header.

    Besides those that outputs came in: that of an active autocast, and those of parameters, because a
    module whose output is float32 may compute in float16 inside.
    """
    own = [w for w in str(header.get("dtype") or "").split(", ") if w in SMALLEST]
    cast = [w for w in str(header.get("autocast_dtype") or "").split(", ") if w]
    return tuple(dict.fromkeys([*dtypes_of(header), *cast, *own]))
