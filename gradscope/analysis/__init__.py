"""Knowing things from a Record: derived quantities and their profiles over depth. No torch.

- `profile`: one quantity over depth at one step, with its increments and their intervals.
- `history`: one quantity over depth for every step and replicate.
- `QUANTITIES`: what there is, with formula, unit and source.
"""

from __future__ import annotations

from gradscope.analysis.history import History, history
from gradscope.analysis.profile import Interval, Profile, interval, profile
from gradscope.analysis.quantities import QKV_NAMES, QUANTITIES, Quantity, find_quantity

__all__ = [
    "QKV_NAMES",
    "QUANTITIES",
    "History",
    "Interval",
    "Profile",
    "Quantity",
    "find_quantity",
    "history",
    "interval",
    "profile",
]
