"""Mean-field theory of activations that grow faster than linearly, against closed forms.

With a = ½·3σ_w² for ReLU² and 15σ_w² for x³ the length map is σ_b² + a·q^p, p = 2 or 3: it has a stable
fixed point below an unstable one, or none, and from beyond the unstable one q grows without bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from gradscope.analysis.meanfield import (
    Activation,
    critical_line,
    critical_weight_variance,
    mean_field,
    theory_profile,
)
from gradscope.errors import QuantityError

RELU2 = Activation(
    name="relu²", phi=lambda x: np.maximum(x, 0.0) ** 2, dphi=lambda x: 2 * np.maximum(x, 0.0)
)
CUBE = Activation(name="x³", phi=lambda x: x**3, dphi=lambda x: 3 * x**2)
#: E sinh² = (e^(2q) − 1)/2, E cosh² = (e^(2q) + 1)/2: overflows within a few layers.
SINH = Activation(name="sinh", phi=np.sinh, dphi=np.cosh)
#: Slopes grow by a logarithm only.
LOGARITHMIC = Activation(
    name="x ln(1 + x²)",
    phi=lambda x: x * np.log1p(x**2),
    dphi=lambda x: np.log1p(x**2) + 2 * x**2 / (1 + x**2),
)

# E φ(√q z)², E φ′(√q z)²: moments of a Gaussian, 1·3·…·(2n − 1) q^n, halved where one side counts.
MEANS: dict[str, tuple[Callable[[float], float], Callable[[float], float]]] = {
    "relu²": (lambda q: 3 * q**2 / 2, lambda q: 2 * q),
    "x³": (lambda q: 15 * q**3, lambda q: 27 * q**2),
    "sinh": (lambda q: math.expm1(2 * q) / 2, lambda q: (math.exp(2 * q) + 1) / 2),
}


@pytest.mark.parametrize("q", [1e-3, 0.7, 8.0])
@pytest.mark.parametrize("phi", [RELU2, CUBE, SINH], ids=lambda a: a.name)
def test_means_are_the_moments_of_a_gaussian(phi: Activation, q: float) -> None:
    square, slope = MEANS[phi.name]
    layer = mean_field(phi, 1e-9).layer
    assert layer.mean_square(q) == pytest.approx(square(q), rel=1e-10)
    assert layer.chi(q) / layer.weight_variance == pytest.approx(slope(q), rel=1e-10)


@pytest.mark.parametrize(
    ("phi", "weight", "bias"),
    [(RELU2, 1.0, 0.0), (RELU2, 1.0, 1.0), (CUBE, 0.1, 0.1), (SINH, 1.0, 0.0), (LOGARITHMIC, 3.0, 0.0)],
    ids=lambda x: x.name if isinstance(x, Activation) else None,
)
def test_where_q_grows_without_bound_there_is_no_chi(phi: Activation, weight: float, bias: float) -> None:
    field = mean_field(phi, weight, bias)
    assert field.q_star == math.inf and field.chi_1 == math.inf and field.increment == math.inf
    assert field.phase == "chaotic"
    assert math.isnan(field.c_star) and math.isnan(field.correlation_depth_scale_layers)
    assert "grows faster than linearly" in field.reasons["q_star"]
    for name in ("chi_1", "chi_q", "increment", "c_star", "chi_c"):
        assert field.reasons[name]
    assert field.gradient_depth_scale_layers == 0.0


def test_the_start_decides_between_rest_and_growth() -> None:
    # q = a q² rests at 0 from below 1/a and grows from above it.
    weight = 1.0
    unstable = 1 / (1.5 * weight)
    below = mean_field(RELU2, weight, q_0=0.999 * unstable)
    assert below.q_star == 0.0 and below.chi_1 == 0.0 and below.phase == "ordered"
    assert below.increment == -math.inf and "χ₁ = 0" in below.reasons["increment"]
    assert math.isnan(below.c_star) and "flat" in below.reasons["c_star"]
    assert mean_field(RELU2, weight, q_0=1.001 * unstable).q_star == math.inf


@pytest.mark.parametrize(("weight", "bias"), [(0.1, 0.1), (0.5, 0.3), (0.01, 2.0)])
def test_with_biases_the_lower_root_is_the_fixed_point(weight: float, bias: float) -> None:
    a = 1.5 * weight
    lower = (1 - math.sqrt(1 - 4 * a * bias)) / (2 * a)
    field = mean_field(RELU2, weight, bias, q_0=bias)
    assert field.q_star == pytest.approx(lower, rel=1e-10)
    assert field.chi_1 == pytest.approx(2 * weight * lower, rel=1e-10)
    assert field.chi_q == pytest.approx(2 * a * lower, rel=1e-10)
    assert not field.reasons.get("chi_1")


@pytest.mark.parametrize("bias", [0.0, 1e-3, 0.1, 5.0])
@pytest.mark.parametrize("phi", [RELU2, CUBE, SINH, LOGARITHMIC], ids=lambda a: a.name)
def test_no_weight_variance_is_critical(phi: Activation, bias: float) -> None:
    # χ₁ = 1 at q: the length map's slope there, E[hφφ′]/(q E φ′²), is 3/2 (ReLU²), 5/3 (x³),
    # 2/(1 + e^(−2q)) (sinh): above 1, so that nothing comes to rest there.
    with pytest.raises(QuantityError, match="no critical σ_w²") as raised:
        critical_weight_variance(phi, bias)
    assert "grows faster than linearly" in str(raised.value)
    with pytest.raises(QuantityError, match="no critical"):
        critical_line(phi, [bias])


def test_an_oscillating_slope_has_no_limit() -> None:
    # E φ′² → 1 + ½ as q → ∞ for x + sin²x; its slope at any one point far out is between 0 and 2.
    snake = Activation(name="snake", phi=lambda x: x + np.sin(x) ** 2, dphi=lambda x: 1 + np.sin(2 * x))
    assert all(math.isnan(s) for s in snake.slopes(far=True))
    field = mean_field(snake, 4.0)
    assert math.isnan(field.chi_1) and field.phase == "unknown" and field.reasons["chi_1"]


def test_slopes_that_fall_or_rise_for_ever_have_their_limit() -> None:
    square = Activation(name="x²", phi=lambda x: x**2, dphi=lambda x: 2 * x)
    assert square.slopes(far=True) == (-math.inf, math.inf)
    assert square.slopes(far=False) == (0.0, 0.0)
    root = Activation(
        name="√(1 + x²)^½", phi=lambda x: (1 + x**2) ** 0.25, dphi=lambda x: 0.5 * x * (1 + x**2) ** -0.75
    )
    assert root.slopes(far=True) == (0.0, 0.0)


def test_a_profile_of_a_few_layers_is_the_map_and_of_many_is_refused() -> None:
    field = mean_field(CUBE, 1.0)
    found = theory_profile(field, 3, input_mean_square=0.5, block="activation first")
    q = [0.5]
    for _ in range(3):
        q.append(15 * q[-1] ** 3)
    assert found.mean_square == pytest.approx(q, rel=1e-9)
    assert found.increments == pytest.approx([0.5 * math.log(27 * x**2) for x in q[:3]], rel=1e-9)
    with pytest.raises(QuantityError, match="leave float64 in block"):
        theory_profile(field, 40, input_mean_square=0.5)
    with pytest.raises(QuantityError, match="grows without bound"):
        theory_profile(field, 3)
