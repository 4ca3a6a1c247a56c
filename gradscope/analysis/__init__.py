"""Knowing things from a Record: derived quantities and what follows from them over depth. No torch.

- `profile`: one quantity over depth at one step, with its increments and their intervals.
- `history`: one quantity over depth for every step and replicate.
- `fit_decay`: the family of decay that a profile follows, its rate and depth scale.
- `verdict`, `verdicts`: vanishing, exploding, preserved or inconclusive, with the evidence.
- `predict`, `depth_limit`: the gradient at a depth not built; how deep the architecture can go;
  `law` makes a law of growth of one's own.
- `diagnose`: what is wrong, where, since when, why, and what to do; `rule` makes a rule of one's own.
- `compare`: which layer of a Record departs first from another.
- `meanfield`: what theory expects of a wide plain net, and a measured profile beside it.
- `path_lengths`: how many paths of which length an unrolled residual network has.
- `QUANTITIES`, `FAMILIES`, `LAWS`, `RULES`: what there is, with formula and source.
"""

from __future__ import annotations

from gradscope.analysis import beyond_norm as beyond_norm  # registers its quantities
from gradscope.analysis.change import DepthScale
from gradscope.analysis.compare import compare
from gradscope.analysis.comparison import Comparison, Departure
from gradscope.analysis.decay import DecayFit, fit_decay
from gradscope.analysis.diagnosis import RULES, Diagnosis, Finding, Rule, Threshold, diagnose, rule
from gradscope.analysis.families import FAMILIES, Family, family
from gradscope.analysis.growth import LAWS, Law, law
from gradscope.analysis.history import History, history
from gradscope.analysis.path_lengths import PathLengths, path_lengths
from gradscope.analysis.predict import DepthLimit, Prediction, depth_limit, predict
from gradscope.analysis.profile import Interval, Profile, interval, profile
from gradscope.analysis.quantities import QKV_NAMES, QUANTITIES, Quantity, find_quantity
from gradscope.analysis.verdict import Verdict, Verdicts, verdict, verdicts

__all__ = [
    "FAMILIES",
    "LAWS",
    "QKV_NAMES",
    "QUANTITIES",
    "RULES",
    "Comparison",
    "DecayFit",
    "Departure",
    "DepthLimit",
    "DepthScale",
    "Diagnosis",
    "Family",
    "Finding",
    "History",
    "Interval",
    "Law",
    "PathLengths",
    "Prediction",
    "Profile",
    "Quantity",
    "Rule",
    "Threshold",
    "Verdict",
    "Verdicts",
    "compare",
    "depth_limit",
    "diagnose",
    "family",
    "find_quantity",
    "fit_decay",
    "history",
    "interval",
    "law",
    "path_lengths",
    "predict",
    "profile",
    "rule",
    "verdict",
    "verdicts",
]
