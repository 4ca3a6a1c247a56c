r"""The path spectrum: how much of the gradient crosses 0, 1, 2, ... residual branches on its way.

A residual network is the sum of all paths through it, each of which takes or skips every branch (Veit
et al. 2016, arXiv:1605.06431). Let c_k be the gradient along all paths that cross exactly k branches
(by the chain rule, at the activations as they are), so that

    g = Σ_k c_k,   w_k = ⟨c_k, g⟩/‖g‖²,   Σ_k w_k = 1,   D = Σ_k k·w_k.

D is the effective depth. Paths can cancel: w_k may be negative, and Σ‖c_k‖² may exceed ‖g‖², so both
the norms and the weights are given. Norms, scales and whatever else lies on the stream itself (as the
norm of post-norm does) are crossed by every path and have length 0.

**How it is computed.** The residual branches are found, and their skips proved, in the graph of one
forward pass (`gradscope.experiment.architecture`). A backward pass over it in which nothing is let
through any branch leaves c_0; with what arrived at the branches let through one pass later, the next
leaves c_1, and so on (`gradscope.experiment.graded_backward`). This is exact to rounding at *every*
position of the stream, without sampling and without copies of the batch, and what is cut off beyond K
changes nothing of c_0, ..., c_K. Their sum is checked against the ordinary gradient.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from gradscope.errors import MeasureError
from gradscope.experiment.graded_backward import block_skips, by_blocks, by_branches
from gradscope.experiment.path_sums import StreamSums
from gradscope.experiment.products import l2
from gradscope.experiment.progress import counted
from gradscope.experiment.spectrum import PathSpectrum
from gradscope.experiment.trunk_pass import TrunkPass
from gradscope.experiment.trunk_samples import DEFAULT_MAX_BYTES, ROUNDING, TrunkSamples
from gradscope.experiment.untouched import undisturbed, unwrapped

__all__ = ["GRANULARITIES", "path_spectrum", "spectrum_of"]

#: What one branch is: each sublayer's, or a whole block with its skip taken off.
GRANULARITIES = ("sublayer", "block")


def path_spectrum(
    model: nn.Module,
    batch: Any,
    loss: Callable[[Any, Any], Tensor] | None = None,
    *,
    trunk: str | None = None,
    modules: str | Sequence[str] | None = None,
    granularity: str = "sublayer",
    max_length: int | None = None,
    max_bytes: int = DEFAULT_MAX_BYTES,
    batch_dim: int = 0,
    progress: bool = True,
) -> PathSpectrum:
    """The gradient's parts c_k along all paths that cross exactly k residual branches, for every k.

    Exact up to rounding, on a model as it is: its branches are found (`gradscope.architecture` prints
    them). One ordinary pass, one with half of the samples, and K + 1 backward passes over the trunk: less
    than K + 2 times the cost of one forward and backward pass.

    The model is left alone: a copy that shares its parameters is run, no ``.grad`` is written, and
    the random state is restored. Hooks of yours run in the copy too.

    Args:
        model: the model, in the mode in which it is to be measured, usually ``model.eval()``.
        batch: tensors, or nested tuples, lists and mappings of them. Tensors without dimensions and
            things that are no tensors are passed on as they are.
        loss: ``loss(model, batch)`` → scalar tensor. It must call the model that it is given.
            None: ``model(**batch).loss``. It is also called on a part of the samples.
        trunk: which trunk, by name, where there are several, as for `gradscope.effective_depth`.
        modules: the modules whose outputs are the branches, as for `gradscope.effective_depth`: **you
            vouch for them**. None: they are found.
        granularity: ``sublayer``: attention and feed-forward network are two branches; ``block``: a whole
            block is one, which takes a block with a skip that is a factor (not post-norm), or without
            any.
        max_length: K, the longest length to be told apart; the costs grow with it. None: all, K = n.
            Cut off, the shorter lengths and their weights are still exact, but D is absent.
        max_bytes: how much may be kept for the backward passes at a time. Where the batch keeps more, the
            samples are run in parts as small as this takes. The one ordinary pass of the whole batch is
            not bounded.
        batch_dim: the dimension of the batch's tensors along which the samples lie.
        progress: whether to say on a terminal which length of which part of the samples is being run.

    Returns:
        Norms and weights of all c_k at h_0 and behind every block, and what was checked. With a
        gradient of exactly 0 at h_0, or one that is not finite, they are NaN, and ``status`` says why.

    Raises:
        MeasureError: what `gradscope.effective_depth` refuses; a block's skip is no factor; or one sample
            does not fit into ``max_bytes``.
        LayerError: a pattern matches no module.
        ValueError: ``max_length`` below 0, ``max_bytes`` below 1, or an unknown granularity.

    >>> from gradscope import reference
    >>> model = reference.Transformer("no_skip", depth=3).double()
    >>> tokens = torch.randint(256, (4, 17))
    >>> spectrum = path_spectrum(model, (tokens[:, :-1], tokens[:, 1:]), reference.next_token_loss)
    >>> spectrum.weight.tolist()
    [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    """
    if max_length is not None and operator.index(max_length) < 0:
        raise ValueError(
            f"max_length={max_length}: the shortest path has length 0; None means all lengths"
        )
    check_max_bytes(max_bytes)
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity={granularity!r} is none of {', '.join(GRANULARITIES)}")
    if granularity == "block" and modules is not None:
        raise MeasureError(
            "With whole blocks for branches their skips must be known, and these are found only where no "
            "modules are named. Leave out modules=."
        )
    model = unwrapped(model)
    with undisturbed(model):
        samples = TrunkSamples(model, batch, loss, trunk=trunk, modules=modules, batch_dim=batch_dim)
        return spectrum_of(
            samples,
            blocks=granularity == "block",
            max_length=max_length,
            max_bytes=max_bytes,
            progress=progress,
        )


def check_max_bytes(max_bytes: int) -> None:
    """Refuse no memory at all.

    Raises:
        ValueError: ``max_bytes`` below 1.
    """
    if max_bytes < 1:
        raise ValueError(f"max_bytes={max_bytes}: write the memory that may be taken, such as 2**31")


def spectrum_of(
    samples: TrunkSamples, *, blocks: bool, max_length: int | None, max_bytes: int, progress: bool
) -> PathSpectrum:
    """The spectrum of a batch whose ordinary pass was run.

    Args:
        samples: the batch.
        blocks: whether whole blocks are the branches.
        max_length: K, or None for all lengths.
        max_bytes: as for `path_spectrum`.
        progress: as for `path_spectrum`.
    """
    plain = samples.plain
    last, granularity = plain.last, _granularity(plain, blocks)
    positions = tuple(plain.forward.position_name(number) for number in range(last + 1))
    n = last if blocks else len(plain.branches)
    longest = n if max_length is None else min(operator.index(max_length), n)
    skips = block_skips(plain) if blocks else ()
    sums = StreamSums(samples.gradients, last=last, lengths=longest + 1)
    checks, chunks = samples.checks, 0
    if samples.status == "ok":
        tensors = 2 * (last + 1) + 2 * n  # g and Σ c_k at the positions; what arrives at the branches
        for part in samples.parts(max_bytes, tensors):
            lengths = counted(range(longest + 1), part.called("path spectrum"), show=progress)
            chunks += 1
            sums.begin(part.gradients().stream)
            if blocks:
                by_blocks(part.run, part.seed, lengths, sums.add, skips=skips)
            else:
                by_branches(part.run, part.seed, lengths, sums.add)
            sums.end()
        checks = samples.checks
        if longest == n:
            checks = replace(checks, sum_difference=_checked_sum(samples, sums))
    norm, weight = sums.spectrum()
    if samples.status != "ok":
        norm[:], weight[:] = np.nan, np.nan
    return PathSpectrum(
        branches=n,
        granularity=granularity,
        positions=positions,
        norm_at=_frozen(norm),
        weight_at=_frozen(weight),
        gradient_l2=l2(samples.gradients[0]),
        chunks=chunks,
        checks=checks,
        status=samples.status,
    )


def _checked_sum(samples: TrunkSamples, sums: StreamSums) -> float:
    off, position = sums.sum_difference()
    dtype = samples.gradients[0].dtype
    if not off <= ROUNDING[dtype]:
        name = str(dtype).removeprefix("torch.")
        raise MeasureError(
            f"The parts of the gradient do not sum to the gradient itself at stream position {position} "
            f"(relative difference {off:.1e}, allowed {ROUNDING[dtype]:.0e} in {name}): they cancel too "
            "much, or the gradient is too small, for the dtype. Write model.double()."
        )
    return off


def _granularity(run: TrunkPass, blocks: bool) -> str:
    """How many branches one block is cut into; a block that is called again counts as another."""
    if blocks:
        return "1 branch per block"
    counted = Counter(run.branches)
    each = sorted({counted[position] for position in range(1, run.last + 1)})
    if len(each) == 1:
        return f"{each[0]} branch{'' if each[0] == 1 else 'es'} per block"
    return f"{each[0]} to {each[-1]} branches per block"


def _frozen(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    x.flags.writeable = False
    return x
