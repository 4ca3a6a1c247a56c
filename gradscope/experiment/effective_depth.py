r"""Effective depth D: how many branches the gradient crosses, on average, on its way to the input.

Multiply the backward signal of every residual branch by t. The gradient at the trunk's input is then
a polynomial, g(t) = Σ_k t^k c_k, and c_k is the sum over all paths that cross exactly k branches
(the paths of Veit et al. 2016, arXiv:1605.06431, each with its exact gradient). With g = g(1),

    D = d ln‖g(t)‖ / d ln t at t = 1 = Σ_k k ⟨c_k, g⟩ / ‖g‖² = Σ_i (1 − ⟨g, g_without_i⟩ / ‖g‖²).

D is 0 for the identity, n for a chain of n branches without skips, and additive over branches. The
weights ⟨c_k, g⟩/‖g‖² sum to 1 but may be negative, so D may leave [0, n]. It says how deep a model
*is* for its gradient; it is no quality score.

**How it is computed.** The batch is copied twice, and the backward pass carries the pair (g, ġ), with
ġ = dg/dt: every branch output maps it to (g, ġ + g), and ġ starts from 0 at the end of the trunk. So
D = ⟨g, ġ⟩/‖g‖² from one pass, exact to rounding, without sampling or finite differences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from gradscope.errors import MeasureError
from gradscope.experiment.batches import copied_twice, loss_or_own
from gradscope.experiment.branches import block_of_each, branch_names
from gradscope.experiment.two_copies import TOLERANCE, TrunkRun
from gradscope.experiment.untouched import (
    refuse_coupled_samples,
    shared_copy,
    undisturbed,
    unwrapped,
)

__all__ = ["Checks", "EffectiveDepth", "effective_depth"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checks:
    """What was verified in the same run; both are 0 up to rounding, or the result is refused.

    Attributes:
        copies_difference: the largest difference between the two copies' forward values, over all
            branch outputs and the trunk's end, relative to the largest value there.
        untagged_difference: ‖a − c·u‖/‖a‖ with a the first copy's gradient, u the gradient of an
            ordinary run without copies and tags, and c the one factor by which the loss's reduction
            sees a doubled batch (1/2 for a mean, 1 for a sum).
    """

    copies_difference: float
    untagged_difference: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EffectiveDepth:
    """Effective depth D of one model on one batch.

    Attributes:
        value: D, in branches; NaN where `status` is not ``ok``.
        branches: n, the number of calls of residual branches in one forward pass.
        per_sample: D of each sample by its own gradient, [B] float64; NaN where that gradient is 0,
            and empty where `value` is absent. That value weighs the samples by ‖g_b‖².
        reading_point: where g was read.
        gradient_l2: ‖g‖ there, of the loss as given on the batch as given.
        method: ``gradient``.
        checks: what was verified.
        status: ``ok``, or why there is no value.
    """

    value: float
    branches: int
    per_sample: npt.NDArray[np.float64]
    reading_point: str
    gradient_l2: float
    method: str = "gradient"
    checks: Checks
    status: str = "ok"

    def __str__(self) -> str:
        if self.status != "ok":
            return f"no effective depth at the {self.reading_point}: {self.status}"
        return f"effective depth {self.value:.4g} of {self.branches} branches at the {self.reading_point}"


def effective_depth(
    model: nn.Module,
    batch: Any,
    loss: Callable[[Any, Any], Tensor] | None = None,
    *,
    branches: str | Sequence[str] | None = None,
    batch_dim: int = 0,
) -> EffectiveDepth:
    """Effective depth D of a model whose residual branches are known.

    D = Σ_k k ⟨c_k, g⟩/‖g‖², in branches, with g the gradient at the trunk's input h_0 (the first
    tensor of the first block's arguments) and c_k its part along all paths that cross exactly k
    branches. Computed exactly by a backward pass over two copies of the batch, and checked against
    an ordinary one; together about 2.3 times the cost of one forward and backward pass.

    The model is left alone: a copy that shares its parameters is run, no ``.grad`` is written, and
    the random state is restored. Hooks of yours run in the copy too.

    Args:
        model: the model, in the mode in which it is to be measured, usually ``model.eval()``.
        batch: tensors, or nested tuples, lists and mappings of them. Tensors without dimensions and
            things that are no tensors are passed on as they are; all others are copied.
        loss: ``loss(model, batch)`` → scalar tensor. It must call the model that it is given.
            None: ``model(**batch).loss``.
        branches: names, or globs, of the modules whose outputs are added to the stream, such as
            ``["blocks.*.attention", "blocks.*.mlp"]``; in a stack without skips, the layers. **You
            vouch for them**: a module whose output is something else (one that adds the skip itself,
            say) gives a number that means nothing. None: the model says them itself, in an attribute
            ``branches`` (a tuple of names), as `gradscope.reference.Transformer` does. The blocks
            are the numbered modules that hold the branches.
        batch_dim: the dimension of the batch's tensors along which the samples lie.

    Returns:
        D, with D per sample, the reading point and what was checked. With a gradient of exactly 0, or
        one that is not finite, D is absent: NaN, with the reason in ``status``.

    Raises:
        MeasureError: the branches are not known; the samples influence each other or are treated at
            random (BatchNorm on batch statistics, active dropout, a loss that sees the copies of a
            sample as others), so that the copied batch is another experiment; the stream is neither
            float32 nor float64; or a check failed.
        LayerError: a pattern matches no module.

    >>> from gradscope import reference
    >>> model = reference.Transformer("no_skip", depth=3).double()
    >>> tokens = torch.randint(256, (4, 17))
    >>> depth = effective_depth(model, (tokens[:, :-1], tokens[:, 1:]), reference.next_token_loss)
    >>> print(depth)
    effective depth 6 of 6 branches at the input of blocks.0
    """
    model = unwrapped(model)
    names = branch_names(model, branches)
    blocks = block_of_each(names)
    refuse_coupled_samples(model)
    loss = loss_or_own(loss, batch)
    with undisturbed(model):
        single, doubled = copied_twice(batch, batch_dim)
        twin = shared_copy(model)
        plain = TrunkRun(twin, names, blocks, None)
        untagged = plain.gradient(loss, single)
        if untagged is None:
            raise MeasureError(
                f"No gradient path from the loss to the input of {plain.first_block}: something between "
                "them is detached, or runs under no_grad."
            )
        size, absent = untagged.numel(), ""
        if not size or not torch.isfinite(untagged).all():
            absent = "the gradient there is not finite" if size else "the tensor there is empty"
        elif not untagged.any():
            absent = "the gradient there is exactly 0 (a zero by construction, or underflow)"
        if absent:
            return EffectiveDepth(
                value=math.nan,
                branches=len(plain.calls),
                per_sample=_frozen(np.full(0, math.nan)),
                reading_point=f"input of {plain.first_block}",
                gradient_l2=_norm(untagged),
                checks=Checks(copies_difference=math.nan, untagged_difference=math.nan),
                status=absent,
            )
        tagged = TrunkRun(twin, names, blocks, plain)
        both = tagged.gradient(loss, doubled)
    assert both is not None  # the same graph as in the plain pass, and that had a gradient
    return _result(plain, tagged, untagged, both)


def _result(plain: TrunkRun, tagged: TrunkRun, untagged: Tensor, both: Tensor) -> EffectiveDepth:
    tolerance = TOLERANCE[untagged.dtype]
    # Float64 on the host, scaled to 1: the norm's square of a vanished gradient would underflow.
    dim = tagged.input_dim
    u = _unit(untagged)
    first, second = both.double().cpu().chunk(2, dim)
    largest = first.abs().amax()
    a, b = first / largest, second / largest
    factor = torch.sum(a * u) / torch.sum(u * u)
    off = float(torch.sum((a - factor * u) ** 2).sqrt() / torch.sum(a * a).sqrt())
    if not (off <= tolerance and factor > 0):
        raise MeasureError(
            f"The copied batch has another gradient than the batch itself (relative difference "
            f"{off:.1e}, allowed {tolerance:.0e} in {str(untagged.dtype).removeprefix('torch.')}): the "
            "loss compares samples with each other, or weighs them by their place in the batch, or the "
            "gradient is too small for its dtype. Write a loss that is a mean or a sum over samples; for "
            "the dtype, model.double()."
        )
    samples = a.shape[dim]
    products = (a * b).movedim(dim, 0).reshape(samples, -1).sum(1).numpy()
    squares = (a * a).movedim(dim, 0).reshape(samples, -1).sum(1).numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        per_sample = np.where(squares > 0, products / squares, math.nan)
    return EffectiveDepth(
        value=float(products.sum() / squares.sum()),
        branches=len(plain.calls),
        per_sample=_frozen(per_sample),
        reading_point=f"input of {plain.first_block}",
        gradient_l2=_norm(untagged),
        checks=Checks(copies_difference=tagged.copies_difference, untagged_difference=off),
    )


def _unit(x: Tensor) -> Tensor:
    x = x.double().cpu()
    return x / x.abs().amax()


def _norm(x: Tensor) -> float:
    x = x.double().cpu()
    largest = x.abs().amax() if x.numel() else torch.zeros(())
    if not largest > 0 or not torch.isfinite(largest):
        return float(largest)
    return float(largest * torch.sum((x / largest) ** 2).sqrt())


def _frozen(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    x.flags.writeable = False
    return x
