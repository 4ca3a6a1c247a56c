"""Mean-field theory of wide plain nets at initialisation, and how far a measured net is from it.

- `mean_field`: fixed points, χ₁, depth scales and phase of an activation at (σ_w², σ_b²).
- `critical_weight_variance`, `critical_line`: where χ₁ = 1.
- `weight_variance_of`, `bias_variance_of`: σ_w² and σ_b² of the common initialisations.
- `theory_profile`, `finite_width_drift`, `overlay`: the expected profile over depth, over a measured one.

Poole et al. 2016 (arXiv:1606.05340), Schoenholz et al. 2017 (arXiv:1611.01232), Hanin 2018
(arXiv:1801.03744).
"""

from __future__ import annotations

from gradscope.analysis.meanfield.activations import (
    ACTIVATIONS,
    Activation,
    find_activation,
    leaky_relu,
)
from gradscope.analysis.meanfield.fixed_point import CRITICAL_TOLERANCE, RandomLayer
from gradscope.analysis.meanfield.initialisations import (
    INITIALISATIONS,
    Initialisation,
    bias_variance_of,
    weight_variance_of,
)
from gradscope.analysis.meanfield.overlay import (
    FiniteWidthDrift,
    Overlay,
    TheoryProfile,
    finite_width_drift,
    overlay,
    theory_profile,
)
from gradscope.analysis.meanfield.theory import (
    MeanField,
    critical_line,
    critical_weight_variance,
    mean_field,
)

__all__ = [
    "ACTIVATIONS",
    "CRITICAL_TOLERANCE",
    "INITIALISATIONS",
    "Activation",
    "FiniteWidthDrift",
    "Initialisation",
    "MeanField",
    "Overlay",
    "RandomLayer",
    "TheoryProfile",
    "bias_variance_of",
    "critical_line",
    "critical_weight_variance",
    "find_activation",
    "finite_width_drift",
    "leaky_relu",
    "mean_field",
    "overlay",
    "theory_profile",
    "weight_variance_of",
]
