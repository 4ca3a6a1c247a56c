"""Named depths against closed forms, and the table that they stand in."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradscope
from gradscope.errors import MeasureError
from gradscope.experiment import depth_methods as table
from gradscope.experiment.depth_methods import (
    DepthReading,
    DepthRequest,
    depth_by,
    depth_method,
    depth_methods,
)


class Scaled(nn.Module):
    """x + a·Rx with R a rotation by a right angle: every path's gradient is known."""

    def __init__(self, a: float, skip: float = 1.0) -> None:
        super().__init__()
        self.f = nn.Linear(2, 2, bias=False)
        self.f.weight.data = a * torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        return self.skip * x + self.f(x) if self.skip else self.f(x)


def rotating(a: float, blocks: int = 6, skip: float = 1.0) -> nn.Sequential:
    return nn.Sequential(*[Scaled(a, skip) for _ in range(blocks)]).double()


def request(model: nn.Module, modules: str | None = "*.f") -> DepthRequest:
    x = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return DepthRequest(model=model, batch=x, loss=lambda m, b: m(b)[:, 0].sum(), modules=modules)


def test_by_energy_a_rotating_stack_is_binomial() -> None:
    """‖c_k‖ = C(n, k) aᵏ, whatever the directions do."""
    a, n = 0.7, 6
    energy = [(math.comb(n, k) * a**k) ** 2 for k in range(n + 1)]
    expected = sum(k * e for k, e in enumerate(energy)) / sum(energy)
    found = depth_by("gradient_energy", request(rotating(a)))
    assert found.value == pytest.approx(expected, rel=1e-12)
    assert (found.most, found.unit, found.method) == (6, "branches", "gradient_energy")
    np.testing.assert_allclose(
        found.evidence["norm"] / found.evidence["norm"][0],
        [math.comb(n, k) * a**k for k in range(n + 1)],
    )


def test_by_gradient_it_is_effective_depth() -> None:
    """(1 + iat)ⁿ: D is the real part of n·ia/(1 + ia) = n·a²/(1 + a²)."""
    found = depth_by("gradient", request(rotating(0.7)))
    assert found.value == pytest.approx(6 * 0.49 / 1.49, rel=1e-12)


@pytest.mark.parametrize(("a", "skip"), [(0.9, 0.0), (0.2, 0.0), (1.1, 0.0), (0.5, 1.0)])
def test_propagation_follows_the_six_xi_rule(a: float, skip: float) -> None:
    rate = math.log(a) if not skip else 0.5 * math.log(1 + a * a)
    found = depth_by("propagation", request(rotating(a, blocks=40, skip=skip)))
    assert found.value == pytest.approx(min(40, 3 / abs(rate)), rel=1e-12)
    assert found.unit == "blocks"
    assert found.most == 40


def test_equal_branches_take_part_alike() -> None:
    """e_i = a²/(1 + a²) for every branch of a rotating stack."""
    a = 0.7
    asked = request(rotating(a), modules="*.f")
    with pytest.warns(gradscope.GradscopeWarning, match="a backward pass for each"):
        found = depth_by("participation", asked)
    assert found.evidence["contribution"] == pytest.approx(np.full(6, a * a / (1 + a * a)))
    assert found.value == pytest.approx(6)
    with pytest.warns(gradscope.GradscopeWarning, match="a backward pass for each"):
        found = depth_by("depth_score", asked)
    assert (found.value, found.most, found.unit) == (pytest.approx(3.5), 6, "blocks")


def test_the_paths_of_a_rotating_stack_have_known_norms() -> None:
    """Every path of k branches has ‖aᵏ Rᵏ g‖: the mean length is n·a/(1 + a)."""
    a = 0.7
    asked = request(rotating(a))
    found = depth_by("veit", dataclasses.replace(asked, modules=None))
    assert found.value == pytest.approx(6 * a / (1 + a), rel=1e-12)
    assert found.evidence["mean_norm"] / found.evidence["mean_norm"][0] == pytest.approx(
        [a**k for k in range(7)]
    )
    with pytest.raises(MeasureError, match="named branches"):
        depth_by("veit", asked)
    with pytest.raises(MeasureError, match="layers without a skip"):
        depth_by("veit", dataclasses.replace(request(rotating(a, skip=0.0)), modules=None))


def test_methods_are_asked_for_by_effective_depth() -> None:
    asked = request(rotating(0.7))
    found = gradscope.effective_depth(
        asked.model, asked.batch, asked.loss, modules="*.f", method="gradient_energy"
    )
    assert str(found) == str(depth_by("gradient_energy", asked))
    with pytest.raises(ValueError, match="is none of angular, block_influence"):
        gradscope.effective_depth(asked.model, asked.batch, asked.loss, method="deep")
    with pytest.raises(ValueError, match="belong to"):
        gradscope.effective_depth(
            asked.model, asked.batch, asked.loss, method="propagation", branches=True
        )


def test_a_gradient_that_stays_propagates_through_all_blocks() -> None:
    found = depth_by("propagation", request(rotating(1.0, blocks=7, skip=0.0)))
    assert found.value == 7


def test_what_has_no_gradient_has_no_depth() -> None:
    asked = request(rotating(0.7))
    zero = DepthRequest(
        model=asked.model, batch=asked.batch, loss=lambda m, b: 0 * m(b).sum(), modules="*.f"
    )
    for name in ("gradient", "gradient_energy", "propagation"):
        found = depth_by(name, zero)
        assert math.isnan(found.value)
        assert found.status != "ok"
        assert f"no depth by {name}" in str(found)


def test_an_unknown_name_lists_all_names() -> None:
    with pytest.raises(
        ValueError, match="gradient_energy, lens_kl, lens_overlap, participation"
    ) as caught:
        depth_by("depth", request(rotating(0.7)))
    assert all(name in str(caught.value) for name in depth_methods())


def test_every_method_says_its_unit_and_its_source() -> None:
    for name, method in depth_methods().items():
        assert method.name == name
        assert method.unit and method.citation and method.formula
        assert method.read.__doc__


def test_a_result_prints_its_own_scale() -> None:
    text = str(depth_by("propagation", request(rotating(0.2, blocks=40, skip=0.0))))
    assert text.startswith("depth by propagation: 1.864 of 40 blocks")
    assert "arXiv:1611.01232" in text


def test_a_method_of_your_own_is_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "_METHODS", dict(depth_methods()))

    @depth_method("constant", formula="2", unit="blocks", citation="nobody")
    def constant(request: DepthRequest) -> DepthReading:
        """Always two."""
        return DepthReading(value=2.0, most=3.0, reading_point="input of 0")

    found = depth_by("constant", request(rotating(0.7)))
    assert str(found) == "depth by constant: 2 of 3 blocks (2; nobody)"
    with pytest.raises(ValueError, match="'constant' is there already"):
        depth_method("constant", formula="2", unit="blocks", citation="nobody")(constant)


def test_what_a_method_refuses_is_refused() -> None:
    with pytest.raises(MeasureError, match="dropout"):
        depth_by("gradient", request(nn.Sequential(Scaled(0.5), nn.Dropout(0.1)).double(), "0.f"))
