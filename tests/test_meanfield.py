"""Mean-field theory against closed forms, slow obvious integrals, and measured networks."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import erf
from torch import Tensor, nn

import gradscope
from gradscope.analysis.meanfield import (
    ACTIVATIONS,
    INITIALISATIONS,
    Activation,
    MeanField,
    RandomLayer,
    bias_variance_of,
    critical_line,
    critical_weight_variance,
    find_activation,
    finite_width_drift,
    leaky_relu,
    mean_field,
    overlay,
    theory_profile,
    weight_variance_of,
)
from gradscope.errors import QuantityError
from gradscope.reference import INITIALIZATIONS

# -- closed forms ----------------------------------------------------------------------------------

# Name → E φ(√q z)², E φ′(√q z)², E φ(u)φ(v): erf (Williams 1998), ReLU (Cho & Saul 2009), sine (the
# characteristic function).
CLOSED: dict[str, tuple[Callable[..., float], Callable[..., float], Callable[..., float]]] = {
    "erf": (
        lambda q: 2 / math.pi * math.asin(2 * q / (1 + 2 * q)),
        lambda q: 4 / math.pi / math.sqrt(1 + 4 * q),
        lambda q, c: 2 / math.pi * math.asin(2 * q * c / (1 + 2 * q)),
    ),
    "relu": (
        lambda q: q / 2,
        lambda q: 0.5,
        lambda q, c: q / (2 * math.pi) * (math.sqrt(1 - c * c) + (math.pi - math.acos(c)) * c),
    ),
    "sin": (
        lambda q: -math.expm1(-2 * q) / 2,
        lambda q: (1 + math.exp(-2 * q)) / 2,
        lambda q, c: (math.exp(-q * (1 - c)) - math.exp(-q * (1 + c))) / 2,
    ),
    "linear": (lambda q: q, lambda q: 1.0, lambda q, c: q * c),
}


def layer(activation: str | Activation, weight: float = 1.0, bias: float = 0.0) -> RandomLayer:
    return RandomLayer(activation=find_activation(activation), weight_variance=weight, bias_variance=bias)


def without_short_cuts(name: str) -> RandomLayer:
    """The activation as if it were any other: ReLU and linear would not be integrated at all."""
    a = ACTIVATIONS[name]
    return layer(Activation(name=name, phi=a.phi, dphi=a.dphi, kinks=a.kinks))


@pytest.mark.parametrize("q", [1e-6, 1e-2, 1.0, 30.0, 1e4, 1e8])
@pytest.mark.parametrize("name", ["erf", "relu", "linear"])
def test_gaussian_means_are_the_closed_forms_at_any_length(name: str, q: float) -> None:
    square, slope, _ = CLOSED[name]
    for net in (layer(name), without_short_cuts(name)):
        assert net.mean_square(q) == pytest.approx(square(q), rel=1e-11)
        assert net.chi(q) == pytest.approx(slope(q), rel=1e-11)


@pytest.mark.parametrize("q", [1e-4, 1.0, 1e4])
def test_an_oscillating_activation_is_followed(q: float) -> None:
    square, slope, _ = CLOSED["sin"]
    assert layer("sin").mean_square(q) == pytest.approx(square(q), rel=1e-10)
    assert layer("sin").chi(q) == pytest.approx(slope(q), rel=1e-10)


def test_tanh_at_a_large_length_where_gauss_hermite_fails() -> None:
    """E f(√q z) = [∫f − ∫h²f/(2q) + …]/√(2πq) for an integrable f: sech² and sech⁴ in closed form."""
    q = 1e4
    norm = math.sqrt(2 * math.pi * q)
    square = 1 - (2 - math.pi**2 / (12 * q)) / norm
    slope = (4 / 3 - (math.pi**2 - 6) / (18 * q)) / norm
    assert layer("tanh").mean_square(q) == pytest.approx(square, rel=1e-9)
    assert layer("tanh").chi(q) == pytest.approx(slope, rel=2e-8)
    for points, ratio in ((100, 0), (101, 23)):  # with and without a node at 0
        nodes, weights = np.polynomial.hermite_e.hermegauss(points)
        f = (1 - np.tanh(math.sqrt(q) * nodes) ** 2) ** 2
        hermite = float((weights * f).sum() / math.sqrt(2 * math.pi))
        assert hermite / slope == pytest.approx(ratio, abs=0.5)


@pytest.mark.parametrize("q", [0.05, 1.0, 40.0])
@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_means_of_every_activation_are_those_of_a_fine_grid(name: str, q: float) -> None:
    """Midpoint sums with 2 million points, which no kink of the table falls into the middle of."""
    a = ACTIVATIONS[name]
    step = 20 / 1_000_000
    z = np.arange(-1_000_000, 1_000_000) * step + step / 2
    weight = np.exp(-z * z / 2) * step / math.sqrt(2 * math.pi)
    h = math.sqrt(q) * z
    assert layer(name).mean_square(q) == pytest.approx(float((a.phi(h) ** 2 * weight).sum()), rel=1e-8)
    # A jump of φ′ costs the grid up to one step, of a slope that may be 1 over a tenth of a unit of z.
    assert layer(name).chi(q) == pytest.approx(float((a.dphi(h) ** 2 * weight).sum()), rel=1e-3)
    growth = float((h * a.phi(h) * a.dphi(h) * weight).sum()) / q
    assert layer(name).length_slope(q) == pytest.approx(growth, rel=1e-3, abs=1e-7)


TORCH: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: x,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "tanh": torch.tanh,
    "hardtanh": F.hardtanh,
    "erf": torch.erf,
    "sin": torch.sin,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "elu": F.elu,
    "selu": F.selu,
}


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_the_table_is_torchs_and_its_derivative_that_of_autograd(name: str) -> None:
    x = torch.linspace(-12, 12, 1200, dtype=torch.float64, requires_grad=True)
    y = TORCH[name](x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    at = x.detach().numpy()
    # softplus of torch is linear above 20 / β only; torch's SELU has more digits than float32.
    assert ACTIVATIONS[name].phi(at) == pytest.approx(y.detach().numpy(), abs=1e-13, rel=1e-12)
    assert ACTIVATIONS[name].dphi(at) == pytest.approx(slope.numpy(), abs=1e-13, rel=1e-12)


@pytest.mark.parametrize("name", sorted(set(ACTIVATIONS) - {"sin"}))
def test_at_extreme_lengths_only_the_slopes_are_left(name: str) -> None:
    """E φ′(√q z)² → ½[φ′(0−)² + φ′(0+)²] as q → 0, ½[φ′(−∞)² + φ′(∞)²] as q → ∞."""
    a = ACTIVATIONS[name]
    assert layer(name).chi(1e-14) == pytest.approx(layer(name).chi(0.0), rel=1e-6)
    assert layer(name).chi(1e14) == pytest.approx(layer(name).chi(math.inf), rel=1e-6, abs=1e-6)
    assert layer(name).chi(0.0) == pytest.approx(a.mean_square_slope(far=False))


# -- correlations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [-0.7, 0.0, 0.3, 0.9, 0.9999])
@pytest.mark.parametrize("q", [0.1, 1.0, 50.0])
@pytest.mark.parametrize("name", ["erf", "relu", "sin"])
def test_the_correlation_map_is_the_closed_form(name: str, q: float, c: float) -> None:
    square, _, product = CLOSED[name]
    weight, bias = 1.7, 0.2
    net = layer(name, weight, bias)
    expected = (weight * product(q, c) + bias) / (weight * square(q) + bias)
    assert net.correlation(c, q) == pytest.approx(expected, abs=1e-9)
    assert net.correlation(1.0, q) == 1
    h = 1e-5
    slope = (product(q, c + h) - product(q, c - h)) / (2 * h) * weight / (weight * square(q) + bias)
    assert net.correlation_slope(c, q) == pytest.approx(slope, rel=2e-3 if c > 0.999 else 1e-6, abs=1e-9)


def test_opposite_inputs() -> None:
    assert layer("tanh").correlation(-1.0, 2.0) == pytest.approx(-1, abs=1e-12)
    assert layer("relu").correlation(-1.0, 2.0) == pytest.approx(0, abs=1e-12)


def test_the_correlation_map_keeps_its_precision_close_to_one() -> None:
    """(1 − f(c))/(1 − c) at 1 − c = 1e-11, where 1 − f has no digits: it is χ₁ to O(1 − c) for erf."""
    q = 3.0
    net = layer("erf")
    # 1 − f = (2/π)[asin s − asin(sc)]/V with s = 2q/(1 + 2q); the slope of asin at s.
    s = 2 * q / (1 + 2 * q)
    slope = s / math.sqrt(1 - s * s) / math.asin(s)
    assert net.correlation_spread(1e-11, q) == pytest.approx(slope, rel=1e-9)


def iterated(net: tuple[Callable[..., float], ...], weight: float, bias: float) -> tuple[float, float]:
    """q* and c* by doing what the theory says: layer after layer, from q = 1 and c = ½."""
    square, _, product = net
    q, c = 1.0, 0.5
    for _ in range(3000):
        q = weight * square(q) + bias
    for _ in range(3000):
        c = (weight * product(q, c) + bias) / q
    return q, c


@pytest.mark.parametrize(
    ("name", "weight", "bias"),
    [("erf", 3.0, 0.1), ("erf", 0.9, 0.1), ("erf", 30.0, 1.0), ("sin", 2.5, 0.3), ("sin", 1.5, 0.01)],
)
def test_fixed_points_are_where_the_iteration_ends(name: str, weight: float, bias: float) -> None:
    square, slope, product = CLOSED[name]
    q, c = iterated(CLOSED[name], weight, bias)
    found = mean_field(name, weight, bias)
    assert found.q_star == pytest.approx(q, rel=1e-10)
    assert found.c_star == pytest.approx(c, abs=1e-8)
    chi = weight * slope(q)
    assert found.chi_1 == pytest.approx(chi, rel=1e-10)
    assert found.phase == ("chaotic" if chi > 1 else "ordered")
    assert found.increment == pytest.approx(math.log(chi) / 2, rel=1e-9)
    assert found.gradient_depth_scale_layers == pytest.approx(1 / abs(math.log(chi)), rel=1e-8)
    h = 1e-6
    chi_q = weight * (square(q + h) - square(q - h)) / (2 * h)
    assert found.chi_q == pytest.approx(chi_q, abs=1e-7)
    assert found.length_depth_scale_layers == pytest.approx(-1 / math.log(abs(chi_q)), rel=1e-5)
    if chi > 1:
        chi_c = weight * (product(q, c + h) - product(q, c - h)) / (2 * h) / q
        assert c < 1
        assert found.chi_c == pytest.approx(chi_c, abs=1e-7)
        assert found.correlation_depth_scale_layers == pytest.approx(-1 / math.log(chi_c), rel=1e-5)
    else:
        assert (found.c_star, found.chi_c) == (1, found.chi_1)
        assert found.correlation_depth_scale_layers == found.gradient_depth_scale_layers
    assert found.reasons == {}


# -- published and derived numbers -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "chi"), [(1.0, 0.759032), (1.3, 0.880164), (2.5, 1.133516), (4.0, 1.342402)]
)
def test_tanh_at_a_bias_variance_of_a_twentieth(weight: float, chi: float) -> None:
    found = mean_field("tanh", weight, 0.05)
    assert found.chi_1 == pytest.approx(chi, abs=1e-6)
    assert found.increment == pytest.approx(0.5 * math.log(chi), abs=1e-6)


def test_tanh_is_critical_at_one_point_and_has_its_depth_scale() -> None:
    assert critical_weight_variance("tanh", 0.05) == pytest.approx(1.76095, abs=1e-5)
    assert mean_field("tanh", 1.0, 0.05).gradient_depth_scale_layers == pytest.approx(3.627, abs=5e-4)
    at = mean_field("tanh", critical_weight_variance("tanh", 0.05), 0.05)
    assert at.phase == "critical"
    assert at.gradient_depth_scale_layers == at.correlation_depth_scale_layers == math.inf
    assert at.c_star == 1
    assert set(at.reasons) == {"gradient_depth_scale_layers", "correlation_depth_scale_layers"}


def test_selu_has_the_fixed_point_that_it_was_made_for() -> None:
    """Mean 0 and variance 1 are kept at σ_w² = 1 (Klambauer et al. 2017, arXiv:1706.02515)."""
    assert mean_field("selu", 1.0).q_star == pytest.approx(1, abs=1e-9)
    assert mean_field("selu", 1.0).c_star == 0


# -- the critical line -----------------------------------------------------------------------------


@pytest.mark.parametrize("q", [1e-3, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("name", ["erf", "sin"])
def test_the_critical_line_is_its_parametric_form(name: str, q: float) -> None:
    square, slope, _ = CLOSED[name]
    weight = 1 / slope(q)
    bias = q - weight * square(q)
    assert critical_weight_variance(name, bias) == pytest.approx(weight, rel=1e-6)
    assert critical_line(name, [0.0, bias]) == pytest.approx([1 / slope(0), weight], rel=1e-6)


def test_critical_weights_without_biases_are_the_inverse_square_slope_at_zero() -> None:
    assert critical_weight_variance("tanh") == 1
    assert critical_weight_variance("hardtanh") == 1
    assert critical_weight_variance("linear") == 1
    assert critical_weight_variance("relu") == 2
    assert critical_weight_variance(leaky_relu(0.5)) == pytest.approx(2 / 1.25)
    assert critical_weight_variance("relu", 0.3) == 2
    assert critical_line("tanh", []).shape == (0,)


@pytest.mark.parametrize(
    ("name", "bias", "said"),
    [
        ("softplus", 0.1, "no q*"),
        ("gelu", 0.0, "q* = 0 is not stable"),
        ("gelu", 0.1, "not stable"),
    ],
)
def test_where_there_is_no_critical_point_it_is_said(name: str, bias: float, said: str) -> None:
    with pytest.raises(QuantityError, match="no critical") as error:
        critical_weight_variance(name, bias)
    assert said in str(error.value)


def test_gelu_has_a_critical_point_once_its_fixed_point_is_stable() -> None:
    weight = critical_weight_variance("gelu", 0.5)
    assert mean_field("gelu", weight, 0.5).chi_1 == pytest.approx(1, abs=1e-6)
    assert mean_field("gelu", 0.98 * weight, 0.5).phase == "ordered"
    assert mean_field("gelu", 1.005 * weight, 0.5).phase == "chaotic"


# -- where there is no fixed point, or a limit -------------------------------------------------------


def test_relu_keeps_every_length_at_two_only_and_has_its_chi_everywhere() -> None:
    at = mean_field("relu", 2.0)
    assert math.isnan(at.q_star)
    assert "every q" in at.reasons["q_star"]
    assert (at.chi_1, at.increment, at.phase, at.c_star) == (1, 0, "critical", 1)
    below, above = mean_field("relu", 1.0), mean_field("relu", 3.0)
    assert (below.q_star, below.chi_1, below.phase) == (0, 0.5, "ordered")
    assert (above.q_star, above.chi_1, above.phase) == (math.inf, 1.5, "chaotic")
    assert "without bound" in above.reasons["q_star"]
    assert "without bound" in mean_field("relu", 2.0, 0.1).reason
    assert mean_field("relu", 1.0, 0.1).q_star == pytest.approx(0.2, rel=1e-12)
    assert mean_field("relu", 1.0, 0.1).c_star == 1
    # 1 − c falls as 1/l², slower than any exponential.
    assert below.correlation_depth_scale_layers == math.inf


def test_torch_default_relu_loses_half_a_log_of_six() -> None:
    n = 256
    weight, bias = weight_variance_of("torch", n, n), bias_variance_of("torch", n, n)
    assert mean_field("relu", weight, bias).increment == pytest.approx(-0.5 * math.log(6), rel=1e-12)
    assert mean_field("linear", weight, bias).increment == pytest.approx(-0.5 * math.log(3), rel=1e-12)


@pytest.mark.parametrize("weight", [0.3, 1.0])
@pytest.mark.parametrize("name", ["tanh", "hardtanh", "sin"])
def test_without_biases_small_weights_end_at_zero_exactly(name: str, weight: float) -> None:
    found = mean_field(name, weight)
    assert found.q_star == 0
    assert found.chi_1 == weight
    assert found.phase == ("critical" if weight == 1 else "ordered")
    assert math.isnan(found.c_star)
    assert "linear" in found.reasons["c_star"]


def test_just_above_one_tanh_is_chaotic_with_a_small_length() -> None:
    """V(q) = q − 2q² + 17q³/3 − …, so that q* = ε/2 + O(ε²) at σ_w² = 1 + ε, without correlation."""
    found = mean_field("tanh", 1.001)
    assert found.q_star == pytest.approx(0.0005, rel=2e-3)
    assert (found.phase, found.c_star) == ("chaotic", 0)


def test_a_linear_layer_has_no_correlation_of_its_own() -> None:
    assert math.isnan(mean_field("linear", 2.0).c_star)
    assert mean_field("linear", 0.5, 0.1).c_star == 1


def test_of_two_resting_places_the_start_decides() -> None:
    """GELU at σ_w² = 2.2: a small q falls to 0, a large one grows; as a sampled wide net does, too."""
    low, high = mean_field("gelu", 2.2, q_0=0.1), mean_field("gelu", 2.2, q_0=100.0)
    assert (low.q_star, low.chi_1) == (0, pytest.approx(0.55))
    assert (high.q_star, high.chi_1) == (math.inf, pytest.approx(1.1))
    z = torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for start, grows in ((0.1, False), (100.0, True)):
        q = start
        for _ in range(60):
            q = 2.2 * float(F.gelu(math.sqrt(q) * z).square().mean())
        assert (q > 10 * start) if grows else (q < start / 10)


def test_no_weights_at_all() -> None:
    found = mean_field("tanh", 0.0, 0.1)
    assert (found.q_star, found.chi_1, found.increment) == (pytest.approx(0.1), 0, -math.inf)
    assert found.gradient_depth_scale_layers == 0


def test_a_net_says_what_is_known_of_it() -> None:
    text = str(mean_field("relu", 3.0))
    assert "chaotic" in text
    assert "without bound" in text
    assert "ordered" in str(mean_field("tanh", 1.0, 0.05))


# -- one's own activation --------------------------------------------------------------------------


def test_an_own_activation_is_as_good_as_one_of_the_table() -> None:
    own = mean_field((np.tanh, lambda x: 1 - np.tanh(x) ** 2), 2.5, 0.05)
    assert own.chi_1 == pytest.approx(1.133516, abs=1e-6)
    shifted = Activation(
        name="shifted", phi=lambda x: np.maximum(x - 3, 0), dphi=lambda x: 1.0 * (x > 3), kinks=(3.0,)
    )
    assert layer(shifted).chi(1.0) == pytest.approx(0.5 * (1 - erf(3 / math.sqrt(2))), rel=1e-9)
    # Leaky ReLU by the general way and by the short one.
    a = leaky_relu(0.2)
    plain = Activation(name="leaky", phi=a.phi, dphi=a.dphi, kinks=(0.0,))
    assert mean_field(plain, 1.2, 0.1).q_star == pytest.approx(mean_field(a, 1.2, 0.1).q_star, rel=1e-9)
    assert mean_field(plain, 1.2, 0.1).chi_1 == pytest.approx(1.2 * 1.04 / 2, rel=1e-9)
    assert mean_field("swish", 2.0, 0.1) == mean_field("silu", 2.0, 0.1)


def test_a_wrong_derivative_is_refused() -> None:
    with pytest.raises(QuantityError, match="not the derivative"):
        mean_field((np.tanh, lambda x: 1 - np.tanh(x)), 1.0)
    with pytest.raises(QuantityError, match="jumps"):
        mean_field((np.sign, np.zeros_like), 1.0)
    with pytest.raises(QuantityError, match="not scale-free"):
        mean_field(Activation(name="t", phi=np.tanh, dphi=ACTIVATIONS["tanh"].dphi, scale_free=True), 1.0)
    with pytest.raises(QuantityError, match="same shape"):
        mean_field((lambda x: float(np.sum(x)), np.ones_like), 1.0)


def test_bad_arguments_say_what_is_wrong() -> None:
    with pytest.raises(QuantityError, match=r"no activation 'tan'.*tanh"):
        mean_field("tan", 1.0)
    with pytest.raises(TypeError, match="pair"):
        mean_field(np.tanh, 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weight_variance"):
        mean_field("tanh", -1.0)
    with pytest.raises(ValueError, match="bias_variance"):
        mean_field("tanh", 1.0, math.nan)
    with pytest.raises(ValueError, match="bias_variance"):
        critical_weight_variance("tanh", -1.0)
    with pytest.raises(ValueError, match="q_0"):
        mean_field("tanh", 1.0, q_0=0.0)
    with pytest.raises(ValueError, match="correlation"):
        layer("tanh").correlation(1.5, 1.0)
    with pytest.raises(QuantityError, match="not finite"):
        overflowing = Activation(name="exp", phi=np.exp, dphi=np.exp)
        layer(overflowing).mean_square(1e8)


# -- initialisations -------------------------------------------------------------------------------


def drawn(name: str, fan_in: int, fan_out: int) -> Tensor:
    torch.manual_seed(0)
    linear = nn.Linear(fan_in, fan_out)
    draw: dict[str, Callable[[Tensor], Tensor]] = {
        "torch": lambda w: w,
        "xavier": nn.init.xavier_normal_,
        "he": lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu"),
        "lecun": lambda w: nn.init.kaiming_normal_(w, nonlinearity="linear"),
        "normal": lambda w: nn.init.normal_(w, std=0.02),
        "orthogonal": nn.init.orthogonal_,
    }
    with torch.no_grad():
        return draw[name](linear.weight)


@pytest.mark.parametrize(("fan_in", "fan_out"), [(300, 300), (200, 500), (500, 200)])
@pytest.mark.parametrize("name", sorted(INITIALISATIONS))
def test_weight_variances_are_those_of_drawn_weights(name: str, fan_in: int, fan_out: int) -> None:
    weight = drawn(name, fan_in, fan_out)
    expected = fan_in * weight.square().mean().item()
    assert weight_variance_of(name, fan_in, fan_out) == pytest.approx(expected, rel=0.02)
    assert weight_variance_of(name, fan_in, fan_out, gain=3.0) == pytest.approx(9 * expected, rel=0.02)


@pytest.mark.parametrize("name", sorted(INITIALIZATIONS))
def test_the_reference_models_initialisations_are_known_by_the_same_names(name: str) -> None:
    torch.manual_seed(0)
    weight = INITIALIZATIONS[name](nn.Linear(300, 500).weight.detach())
    expected = 300 * weight.square().mean().item()
    assert weight_variance_of(name, 300, 500) == pytest.approx(expected, rel=0.02)


def test_biases_and_other_names() -> None:
    torch.manual_seed(0)
    bias = nn.Linear(3, 20_000).bias
    assert bias_variance_of("torch", 3, 20_000) == pytest.approx(bias.square().mean().item(), rel=0.02)
    assert bias_variance_of("he", 3, 4) == 0
    assert weight_variance_of("kaiming", 7, 9) == weight_variance_of("he", 7, 9) == 2
    with pytest.raises(QuantityError, match="no initialisation 'hee'"):
        weight_variance_of("hee", 3, 3)
    with pytest.raises(ValueError, match="fan_in"):
        weight_variance_of("he", 0, 3)


# -- finite width ----------------------------------------------------------------------------------


def test_the_drift_of_linear_layers_is_that_of_a_chi_distribution() -> None:
    """E ln(‖Wᵀδ‖/‖δ‖) = E ½ ln(χ²_n/n)."""
    assert finite_width_drift("linear", 128).per_layer == pytest.approx(-0.00392, abs=5e-6)
    samples = np.log(np.random.default_rng(0).chisquare(8, 400_000) / 8) / 2
    expected = finite_width_drift("linear", 8).per_layer
    assert abs(samples.mean() - expected) < 3 * samples.std() / math.sqrt(len(samples))
    assert expected == pytest.approx(-1 / 16, rel=0.1)


def test_the_drift_of_relu_layers_and_of_no_others() -> None:
    assert finite_width_drift("relu", 128).per_layer == pytest.approx(-0.00977, abs=5e-6)
    absent = finite_width_drift("tanh", 128)
    assert math.isnan(absent.per_layer)
    assert absent.status == "not known for tanh: only for linear and ReLU layers"
    assert finite_width_drift(leaky_relu(0.1), 128).status != "ok"
    with pytest.raises(ValueError, match="width"):
        finite_width_drift("relu", 0)


# -- profiles --------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", ["activation last", "activation first"])
def test_the_expected_profile_is_the_map_iterated(block: str) -> None:
    square, slope, _ = CLOSED["erf"]
    weight, bias, depth, start = 2.0, 0.1, 7, 9.0
    found = theory_profile(mean_field("erf", weight, bias), depth, input_mean_square=start, block=block)
    stream, gain = [start], []
    for _ in range(depth):
        q = weight * stream[-1] + bias if block == "activation last" else stream[-1]
        gain.append(0.5 * math.log(weight * slope(q)))
        stream.append(square(q) if block == "activation last" else weight * square(q) + bias)
    assert found.depth.tolist() == list(range(depth + 1))
    assert found.mean_square == pytest.approx(stream, rel=1e-10)
    assert found.increments == pytest.approx(gain, rel=1e-9)
    assert found.log_gradient == pytest.approx([sum(gain[k:]) for k in range(depth + 1)], rel=1e-9)
    assert found.log_gradient[-1] == 0
    assert not found.stationary


def test_without_an_input_every_layer_is_at_rest() -> None:
    field = mean_field("tanh", 2.5, 0.05)
    found = theory_profile(field, 5)
    assert found.increments == pytest.approx([field.increment] * 5)
    assert found.length == pytest.approx([field.q_star] * 5)
    assert 2.5 * found.mean_square + 0.05 == pytest.approx([field.q_star] * 6)
    assert theory_profile(field, 5, block="activation first").mean_square == pytest.approx(
        [field.q_star] * 6
    )
    relu = theory_profile(mean_field("relu", 1.0), 4)
    assert relu.log_gradient[0] == pytest.approx(-2 * math.log(2))
    assert np.isnan(relu.mean_square).all()


def test_a_net_that_never_rests_needs_its_input() -> None:
    """At σ_w² = 1 tanh's q falls as 1/(2l): χ₁ = 1 is only a limit, and its gradient is a power law."""
    field = mean_field("tanh", 1.0)
    with pytest.raises(QuantityError, match="input_mean_square"):
        theory_profile(field, 10)
    found = theory_profile(field, 2000, input_mean_square=1.0)
    assert found.length[-1] == pytest.approx(1 / 4000, rel=0.02)
    # r = ½ ln(1 − 2q) ≈ −1/(2l): ‖δ‖ falls as l^(−1/2) from the loss to the input.
    assert found.log_gradient[100] - found.log_gradient[1600] == pytest.approx(
        -0.5 * math.log(16), rel=0.02
    )
    with pytest.raises(ValueError, match="block"):
        theory_profile(field, 3, block="last")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="depth"):
        theory_profile(field, 0)
    with pytest.raises(ValueError, match="input_mean_square"):
        theory_profile(field, 3, input_mean_square=0.0)


def test_an_overlay_on_the_theory_itself_is_exact_and_knows_its_replicates() -> None:
    field = mean_field("tanh", 1.3, 0.05)
    expected = theory_profile(field, 6)
    rows = np.exp(expected.log_gradient)[None] * np.array([[3.0], [0.2]])
    found = overlay(rows, field)
    assert found.anchor == 6
    assert found.difference == pytest.approx(np.zeros(7), abs=1e-12)
    assert found.standard_error == pytest.approx(np.zeros(7), abs=1e-12)
    assert found.theory == pytest.approx(expected.log_gradient + 0.5 * math.log(0.6), abs=1e-12)
    assert found.theory == pytest.approx(found.measured, abs=1e-12)
    bent = rows.copy()
    bent[0, 2] *= math.exp(0.4)
    found = overlay(bent, field)
    assert found.difference[2] == pytest.approx(0.2)
    assert found.standard_error[2] == pytest.approx(0.2)
    assert found.max_abs_difference == pytest.approx(0.2)
    assert np.isnan(overlay(rows[:1], field).standard_error).all()


def test_positions_without_a_logarithm_are_left_out_and_named() -> None:
    field = mean_field("tanh", 1.3, 0.05)
    rows = np.exp(theory_profile(field, 4).log_gradient)[None].repeat(2, 0)
    rows[0, 0], rows[1, 4] = 0.0, np.nan
    found = overlay(rows, field)
    assert np.isnan(found.difference).tolist() == [True, False, False, False, True]
    assert np.isfinite(found.theory).all()
    assert found.anchor == 3
    assert "left out: exactly 0 at depth 0" in repr(found)
    with pytest.raises(QuantityError, match="needs two"):
        overlay(np.zeros((1, 4)), field)


def test_the_drift_is_counted_in_where_it_is_asked_for_and_known() -> None:
    field = mean_field("relu", 2.0)
    flat = np.ones((1, 11))
    plain, narrow = overlay(flat, field), overlay(flat, field, width=10)
    assert plain.theory == pytest.approx(np.zeros(11))
    assert plain.drift.status == "no width given"
    assert narrow.theory == pytest.approx(-0.125 * np.arange(10, -1, -1))
    forward = overlay(flat, field, quantity="act_mean_square", width=10)
    assert forward.anchor == 0
    assert forward.theory == pytest.approx(-0.125 * np.arange(11))
    unknown = overlay(flat, mean_field("tanh", 1.3, 0.05), width=10)
    assert "not known for tanh" in unknown.notes[-1]
    assert unknown.theory[0] == pytest.approx(10 * unknown.theory[9])
    biased = overlay(
        flat, mean_field("relu", 1.0, 0.1), quantity="act_mean_square", width=10, input_mean_square=1.0
    )
    assert biased.drift.status == "not known for activations with biases"


def test_overlays_refuse_what_theory_does_not_know() -> None:
    field = mean_field("tanh", 1.3, 0.05)
    with pytest.raises(QuantityError, match="no profile of act_var"):
        overlay(np.ones((1, 4)), field, quantity="act_var")
    with pytest.raises(QuantityError, match="input_mean_square"):
        overlay(np.ones((1, 4)), mean_field("relu", 2.0, 0.1), quantity="act_mean_square")


# -- measured networks -----------------------------------------------------------------------------


class Layer(nn.Module):
    """φ(W h + b), or W φ(h) + b, with W ~ N(0, σ_w²/n) and b ~ N(0, σ_b²)."""

    def __init__(
        self, width: int, phi: Callable[[Tensor], Tensor], weight: float, bias: float, last: bool
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) * math.sqrt(weight / width))
        self.bias = nn.Parameter(torch.randn(width) * math.sqrt(bias))
        self.phi, self.last = phi, last

    def forward(self, h: Tensor) -> Tensor:
        if self.last:
            return self.phi(h @ self.weight.T + self.bias)
        return self.phi(h) @ self.weight.T + self.bias


class Net(nn.Module):
    def __init__(self, depth: int, *args: object) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Layer(*args) for _ in range(depth))  # type: ignore[arg-type]

    def forward(self, h: Tensor) -> Tensor:
        for block in self.blocks:
            h = block(h)
        return h


def random_direction(model: nn.Module, x: Tensor) -> Tensor:
    """A loss whose gradient at the output is another random direction for every replicate."""
    y = model(x)
    return (y * torch.randn_like(y)).sum() / math.sqrt(y.numel())


def measured(
    field: MeanField,
    phi: Callable[[Tensor], Tensor],
    *,
    width: int,
    depth: int,
    replicates: int,
    input_mean_square: float,
    batch: int = 1,
    last: bool = True,
) -> gradscope.Record:
    x = torch.randn(batch, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = x * (input_mean_square / x.square().mean(-1, keepdim=True)).sqrt()
    return gradscope.measure(
        lambda: Net(depth, width, phi, field.weight_variance, field.bias_variance, last),
        x,
        random_direction,
        replicates,
        dtype=torch.float64,
        layers="blocks.*",
        statistics=[],
    )


@pytest.mark.parametrize("weight", [1.0, 1.3, 2.5, 4.0])
def test_wide_tanh_nets_follow_their_chi(weight: float) -> None:
    """r = ½ ln χ₁ in nets of width 400 (Schoenholz et al. 2017, arXiv:1611.01232)."""
    field = mean_field("tanh", weight, 0.05)
    at_rest = (field.q_star - field.bias_variance) / field.weight_variance
    record = measured(
        field, torch.tanh, width=400, depth=12, replicates=4, input_mean_square=at_rest, batch=8
    )
    profile = gradscope.profile(record)
    assert profile.mean_increment().estimate == pytest.approx(field.increment, abs=0.012)
    found = overlay(profile, field)
    assert found.max_abs_difference < 12 * 0.012
    assert found.difference[0] / 12 == pytest.approx(
        profile.mean_increment().estimate - field.increment, abs=1e-9
    )
    assert overlay(record, field).difference == pytest.approx(found.difference)


@pytest.mark.parametrize("last", [True, False])
def test_the_transient_towards_the_fixed_point_is_measured_where_theory_has_it(last: bool) -> None:
    """Inputs of 30 times the resting mean square: the first layers lose more than the others."""
    field = mean_field("tanh", 1.3, 0.05)
    block = "activation last" if last else "activation first"
    record = measured(
        field, torch.tanh, width=400, depth=8, replicates=4, input_mean_square=6.0, batch=8, last=last
    )
    for quantity, most in (("grad_l2", 0.08), ("act_mean_square", 0.03)):
        profile = gradscope.profile(record, quantity)
        found = overlay(profile, field, input_mean_square=6.0, block=block)
        assert found.max_abs_difference < most
        assert overlay(profile, field, block=block).max_abs_difference > 10 * most
    # The other block's activations are another thing altogether.
    other = "activation first" if last else "activation last"
    forward = overlay(record, field, quantity="act_mean_square", input_mean_square=6.0, block=other)
    assert forward.max_abs_difference > 0.2


@pytest.mark.parametrize(("name", "phi"), [("linear", lambda h: h), ("relu", F.relu)])
def test_narrow_nets_drift_as_their_width_says(name: str, phi: Callable[[Tensor], Tensor]) -> None:
    """One position, width 32, 16 layers: E ln falls short of ln E by many standard errors."""
    field = mean_field(name, 1.0 if name == "linear" else 2.0)
    width, depth = 32, 16
    record = measured(field, phi, width=width, depth=depth, replicates=250, input_mean_square=1.0)
    for quantity, end in (("grad_l2", 0), ("act_mean_square", -1)):
        profile = gradscope.profile(record, quantity)
        with_drift, without = overlay(profile, field, width=width), overlay(profile, field)
        error = with_drift.standard_error[end]
        assert without.difference[end] < -4 * error
        assert abs(with_drift.difference[end]) < 3 * error
