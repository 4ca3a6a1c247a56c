r"""Effective depth D: how many branches the gradient crosses, on average, on its way to the input.

Multiply the backward signal of every residual branch by t. The gradient at the trunk's input is then
a polynomial, g(t) = Σ_k t^k c_k, and c_k is the sum over all paths that cross exactly k branches
(the paths of Veit et al. 2016, arXiv:1605.06431, each with its exact gradient). With g = g(1),

    D = d ln‖g(t)‖ / d ln t at t = 1 = Σ_k k ⟨c_k, g⟩ / ‖g‖² = Σ_i (1 − ⟨g, g_without_i⟩ / ‖g‖²).

D is 0 for the identity, n for a chain of n branches without skips, and additive over branches. The
weights ⟨c_k, g⟩/‖g‖² sum to 1 but may be negative, so D may leave [0, n]. It says how deep a model
*is* for its gradient; it is no quality score.

**How it is computed.** The residual branches are found, and their skips proved, in the graph of one
forward pass (`gradscope.experiment.architecture`). The ordinary backward pass leaves g at h_0 and g_i at
the output of every branch. A second one over the same graph carries ġ = dg/dt: it begins with 0 at the
end of the trunk, and every branch lets ġ_i + g_i through in the place of ġ_i. So D = ⟨g, ġ⟩/‖g‖² from
two backward passes, exact to rounding, without sampling, finite differences or copies of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from gradscope.collect.arguments import Mask
from gradscope.errors import MeasureError
from gradscope.experiment.branch_shares import BranchContributions
from gradscope.experiment.contributions import branch_contributions
from gradscope.experiment.depth_methods import DepthRequest, NamedDepth, depth_by
from gradscope.experiment.forward_mode import AdditionNumbers, attention_by_formula
from gradscope.experiment.paths import check_max_bytes, spectrum_of
from gradscope.experiment.products import l2
from gradscope.experiment.spectrum import PathSpectrum
from gradscope.experiment.trunk_pass import TrunkPass
from gradscope.experiment.trunk_samples import DEFAULT_MAX_BYTES, ROUNDING, Checks, TrunkSamples
from gradscope.experiment.untouched import undisturbed, unwrapped

__all__ = ["EffectiveDepth", "effective_depth"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EffectiveDepth:
    """Effective depth D of one model on one batch.

    Attributes:
        value: D, in branches; NaN where `status` is not ``ok``.
        branches: n, the number of calls of residual branches in one forward pass.
        per_sample: D of each sample by its own gradient, [B] float64; NaN where that gradient is 0,
            and empty where `value` is absent. That value weighs the samples by ‖g_b‖².
        cancellation: κ = Σ_k‖c_k‖²/‖g‖², above 1 where paths cancel; NaN unless ``spectrum=True``.
        absolute: Σ_k|w_k|, 1 if no path length works against the gradient; NaN unless ``spectrum=True``.
        trunk: the trunk that was read.
        reading_point: where g was read. In a post-norm net the norm there belongs to the block before.
        gradient_l2: ‖g‖ there, of the loss as given on the batch as given.
        method: ``gradient``.
        checks: what was verified.
        status: ``ok``, or why there is no value.
        spectrum: the path spectrum behind D; None unless ``spectrum=True``.
        contributions: what each branch adds to D; None unless ``branches=True``.
    """

    value: float
    branches: int
    per_sample: npt.NDArray[np.float64]
    cancellation: float = math.nan
    absolute: float = math.nan
    trunk: str
    reading_point: str
    gradient_l2: float
    method: str = "gradient"
    checks: Checks
    status: str = "ok"
    spectrum: PathSpectrum | None = field(default=None, repr=False)
    contributions: BranchContributions | None = field(default=None, repr=False)

    def __str__(self) -> str:
        if self.status != "ok":
            return f"no effective depth at the {self.reading_point}: {self.status}"
        beside = ""
        if self.spectrum is not None:
            beside = f" (κ = {self.cancellation:.3g}, Σ|w_k| = {self.absolute:.3g})"
        return (
            f"effective depth {self.value:.4g} of {self.branches} branches at the {self.reading_point}"
            f"{beside}"
        )


@overload
def effective_depth(
    model: nn.Module,
    batch: Any,
    loss: Callable[[Any, Any], Tensor] | None = None,
    *,
    method: Literal["gradient"] = "gradient",
    trunk: str | None = None,
    modules: str | Sequence[str] | None = None,
    branches: bool = False,
    spectrum: bool = False,
    max_bytes: int = DEFAULT_MAX_BYTES,
    batch_dim: int = 0,
    mask: Mask | None = None,
    progress: bool = True,
) -> EffectiveDepth: ...


@overload
def effective_depth(
    model: nn.Module,
    batch: Any,
    loss: Callable[[Any, Any], Tensor] | None = None,
    *,
    method: str,
    trunk: str | None = None,
    modules: str | Sequence[str] | None = None,
    branches: bool = False,
    spectrum: bool = False,
    max_bytes: int = DEFAULT_MAX_BYTES,
    batch_dim: int = 0,
    mask: Mask | None = None,
    progress: bool = True,
) -> EffectiveDepth | NamedDepth: ...


def effective_depth(
    model: nn.Module,
    batch: Any,
    loss: Callable[[Any, Any], Tensor] | None = None,
    *,
    method: str = "gradient",
    trunk: str | None = None,
    modules: str | Sequence[str] | None = None,
    branches: bool = False,
    spectrum: bool = False,
    max_bytes: int = DEFAULT_MAX_BYTES,
    batch_dim: int = 0,
    mask: Mask | None = None,
    progress: bool = True,
) -> EffectiveDepth | NamedDepth:
    """Effective depth D of a model as it is.

    D = Σ_k k ⟨c_k, g⟩/‖g‖², in branches, with g the gradient at the trunk's input h_0 (the first
    tensor of the first block's arguments) and c_k its part along all paths that cross exactly k
    branches. The branches are found, and each skip is proved (`gradscope.architecture` prints them); a
    model in which one cannot be proved is refused. Computed exactly, and checked against the ordinary
    gradient of half of the samples; together about 1.9 times the cost of one forward and backward pass.

    A layer without a skip is a branch that every path crosses, so that D = n in a plain chain. D is no
    score: it ranks no architectures.

    The model is left alone: a copy that shares its parameters is run, no ``.grad`` is written, and
    the random state is restored. Hooks of yours run in the copy too.

    Args:
        model: the model, in the mode in which it is to be measured, usually ``model.eval()``.
        batch: tensors, or nested tuples, lists and mappings of them. Tensors without dimensions and
            things that are no tensors are passed on as they are.
        loss: ``loss(model, batch)`` → scalar tensor. It must call the model that it is given.
            None: ``model(**batch).loss``. It is also called on half of the samples.
        method: ``gradient`` for D. Another name gives another depth of the literature, as a `NamedDepth`
            with its unit, formula and citation: ``gradient_energy``, ``participation``, ``depth_score``,
            ``propagation``, ``veit``; and, from activations alone, ``lens_kl``, ``lens_overlap``,
            ``residual_cosine``, ``block_influence`` and ``angular``. Their values lie on no common scale.
            ``branches``, ``spectrum`` and ``max_bytes`` belong to ``gradient`` alone, and ``modules`` to
            depths by gradients.
        trunk: which trunk, by name, where there are several, such as ``encoder.block`` and
            ``decoder.block``. None: the one at which one arrives first from the loss, or, for depths from
            activations, the one that runs last; the result says it.
        modules: names, or globs, of the modules whose outputs are added to the stream, such as
            ``["blocks.*.attention", "blocks.*.mlp"]``, where they cannot be found; in a stack without
            skips, the layers. **You vouch for them**: a module whose output is something else (one that
            adds the skip itself, say) gives a number that means nothing. The blocks are then the numbered
            modules that hold them.
        branches: whether to say what each branch adds to D as well: e_i = 1 − ⟨g, g_without_i⟩/‖g‖², with
            nothing let back through branch i; Σ e_i = D is checked. One forward-mode pass more, about 3.2
            times the cost of one forward and backward pass in all; where that is impossible, a backward
            pass for each branch, and a warning says so. The whole batch is run at once.
        spectrum: whether to divide the gradient by path length as well (`gradscope.path_spectrum`), which
            gives κ and Σ|w_k|, and checks D by Σ_k k·w_k. It costs n + 1 further backward passes.
        max_bytes: as for `gradscope.path_spectrum`.
        batch_dim: the dimension of the batch's tensors along which the samples lie.
        mask: padding to leave out of the means of depths from activations, as in `gradscope.watch`;
            without it all positions count. Depths by gradients take none.
        progress: whether to say on a terminal how far the spectrum is.

    Returns:
        D, with D per sample, the reading point and what was checked. With a gradient of exactly 0, or
        one that is not finite, D is absent: NaN, with the reason in ``status``.

    Raises:
        MeasureError: what is a branch is not known, and why; several trunks, of which none was chosen;
            the samples influence each other or are treated at random (BatchNorm on batch statistics,
            active dropout, a loss that sees half of the samples as others); the stream is neither float32
            nor float64; or a check failed.
        LayerError: a pattern matches no module.
        ValueError: ``max_bytes`` below 1, a method that there is not, or an argument that it does not
            take.
        TypeError: the model is no module, or the loss no function.

    >>> from gradscope import reference
    >>> model = reference.Transformer("no_skip", depth=3).double()
    >>> tokens = torch.randint(256, (4, 17))
    >>> depth = effective_depth(model, (tokens[:, :-1], tokens[:, 1:]), reference.next_token_loss)
    >>> print(depth)
    effective depth 6 of 6 branches at the input of blocks.0
    """
    check_max_bytes(max_bytes)
    if method != "gradient":
        if branches or spectrum:
            raise ValueError(f'branches= and spectrum= belong to method="gradient", not to {method!r}')
        request = DepthRequest(
            model=model,
            batch=batch,
            loss=loss,
            trunk=trunk,
            modules=modules,
            batch_dim=batch_dim,
            mask=mask,
        )
        return depth_by(method, request)
    if mask is not None:
        raise ValueError("gradient is read from gradients, which take no mask=: leave it out")
    model = unwrapped(model)
    numbers = AdditionNumbers() if branches else None
    with undisturbed(model), attention_by_formula() if branches else nullcontext():
        samples = TrunkSamples(
            model, batch, loss, trunk=trunk, modules=modules, batch_dim=batch_dim, seen=numbers
        )
        plain = samples.plain
        found = EffectiveDepth(
            value=math.nan,
            branches=len(plain.branches),
            per_sample=_frozen(np.full(0, math.nan)),
            trunk=plain.forward.trunk.name,
            reading_point=samples.reading_point,
            gradient_l2=l2(samples.gradients[0]),
            checks=samples.checks,
            status=samples.status,
        )
        if samples.status != "ok":
            return found
        shares = None
        if numbers is not None:
            shares = branch_contributions(*samples.whole(), numbers, progress=progress)
        chain = bool(plain.located) and not any(item.skips for item in plain.located)
        products: list[Tensor] = []
        squares: list[Tensor] = []
        largest = samples.gradients[0].abs().amax().double()
        for part in samples.parts(max_bytes, plain.last + len(plain.branches)):
            gradients = part.gradients()
            g, change = gradients.stream[0], _change(part.run, part.seed, gradients.branches)
            # In float64 and scaled to 1: the square of a vanished gradient would underflow.
            a, b = g.double() / largest, change.double() / largest
            products.append(part.by_sample(a * b))
            squares.append(part.by_sample(a * a))
        product, square = torch.cat(products).cpu().numpy(), torch.cat(squares).cpu().numpy()
        with np.errstate(divide="ignore", invalid="ignore"):
            per_sample = np.where(square > 0, product / square, math.nan)
        value = float(product.sum() / square.sum())
        if chain and abs(value - len(plain.branches)) <= ROUNDING[samples.gradients[0].dtype] * value:
            # No path gets past a layer: what differs from n is rounding.
            value = float(len(plain.branches))
            per_sample = np.where(square > 0, value, math.nan)
        found = replace(
            found,
            value=value,
            per_sample=_frozen(per_sample),
            checks=samples.checks,
        )
        if shares is not None:
            found = _with_contributions(found, shares)
        if not spectrum:
            return found
        behind = spectrum_of(
            samples, blocks=False, max_length=None, max_bytes=max_bytes, progress=progress
        )
    return _with_spectrum(found, behind, ROUNDING[samples.gradients[0].dtype])


def _change(run: TrunkPass, seed: Tensor, arrived: Mapping[int, Tensor]) -> Tensor:
    """ġ at the trunk's input: every branch adds its own gradient to what it lets through."""

    def add(number: int, gradient: Tensor) -> Tensor:
        own = arrived.get(number)
        return gradient if own is None else gradient + own

    found = run.gradient(torch.zeros_like(seed), at_branch=add)
    if found is None:
        raise MeasureError("No gradient arrives at the trunk's input from its end.")
    return found


def _with_contributions(found: EffectiveDepth, shares: BranchContributions) -> EffectiveDepth:
    allowed = ROUNDING[torch.float32] * max(1.0, float(np.abs(shares.value).sum()))
    if not abs(found.value - shares.total) <= allowed:
        raise MeasureError(
            f"D is {found.value:.6g} from the pair of gradients and {shares.total:.6g} from the branches "
            "one by one: they cancel too much for the dtype. Write model.double()."
        )
    return replace(found, contributions=shares)


def _with_spectrum(found: EffectiveDepth, behind: PathSpectrum, rounding: float) -> EffectiveDepth:
    # Parts that cancel are known to rounding of their own size, not to that of their sum.
    allowed = rounding * max(1.0, behind.absolute) * max(1, found.branches)
    if not abs(found.value - behind.effective_depth) <= allowed:
        raise MeasureError(
            f"D is {found.value:.6g} from the pair of gradients and {behind.effective_depth:.6g} from "
            "the path spectrum: the parts cancel too much for the dtype. Write model.double()."
        )
    return replace(
        found,
        cancellation=behind.cancellation,
        absolute=behind.absolute,
        checks=behind.checks,
        spectrum=behind,
    )


def _frozen(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    x.flags.writeable = False
    return x
