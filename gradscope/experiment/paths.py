r"""The path spectrum: how much of the gradient crosses 0, 1, 2, ... residual branches on its way.

A residual network is the sum of all paths through it, each of which takes or skips every branch (Veit
et al. 2016, arXiv:1605.06431). Let c_k be the gradient along all paths that cross exactly k branches
(by the chain rule, at the activations as they are), so that

    g = Σ_k c_k,   w_k = ⟨c_k, g⟩/‖g‖²,   Σ_k w_k = 1,   D = Σ_k k·w_k.

D is the effective depth. Paths can cancel: w_k may be negative, and Σ‖c_k‖² may exceed ‖g‖², so both
the norms and the weights are given. Norms, scales and whatever else lies on the stream itself (as the
norm of post-norm does) are crossed by every path and have length 0.

**How it is computed.** The batch is copied K + 1 times. In the backward pass copy k carries c_k: every
branch output moves copy k to copy k + 1, and only the first copy starts with a gradient at the end of the
trunk. This is exact to rounding at *every* position of the stream, without sampling, and what is cut off
beyond K changes nothing of c_0, ..., c_K. One more copy gets no gradient at all and must arrive with
none: the samples do not influence each other.
"""

from __future__ import annotations

import math
import operator
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from gradscope.errors import MeasureError
from gradscope.experiment.batches import loss_or_own, part_of, repeated, sample_count
from gradscope.experiment.branches import block_of_each, branch_names
from gradscope.experiment.path_sums import SavedBytes, StreamSums
from gradscope.experiment.spectrum import PathSpectrum, SpectrumChecks
from gradscope.experiment.two_copies import TrunkRun
from gradscope.experiment.untouched import (
    refuse_coupled_samples,
    shared_copy,
    undisturbed,
    unwrapped,
)

__all__ = ["DEFAULT_MAX_BYTES", "path_spectrum"]

#: What the copies may keep for their backward pass unless max_bytes= says otherwise: 2 GiB.
DEFAULT_MAX_BYTES: Final = 2 * 2**30


def path_spectrum(
    model: nn.Module,
    batch: Any,
    loss: Callable[[Any, Any], Tensor] | None = None,
    *,
    branches: str | Sequence[str] | None = None,
    max_length: int | None = None,
    max_bytes: int = DEFAULT_MAX_BYTES,
    batch_dim: int = 0,
    progress: bool = True,
) -> PathSpectrum:
    """The gradient's parts c_k along all paths that cross exactly k residual branches, for every k.

    Exact up to rounding: one backward pass over K + 2 copies of the batch and an ordinary one, at about
    K + 3 times the cost of one forward and backward pass (`gradscope.effective_depth` gives D alone at
    2.3 times).

    The model is left alone: a copy that shares its parameters is run, no ``.grad`` is written, and
    the random state is restored. Hooks of yours run in the copy too.

    Args:
        model: the model, in the mode in which it is to be measured, usually ``model.eval()``.
        batch: tensors, or nested tuples, lists and mappings of them. Tensors without dimensions and
            things that are no tensors are passed on as they are; all others are copied.
        loss: ``loss(model, batch)`` → scalar tensor. It must call the model that it is given.
            None: ``model(**batch).loss``. Where the samples are run in parts, it is called on each.
        branches: names, or globs, of the modules whose outputs are added to the stream, as for
            `gradscope.effective_depth`: **you vouch for them**. None: the model's own attribute
            ``branches``.
        max_length: K, the longest length to be told apart; the costs grow with it. None: all, K = n.
            Cut off, the shorter lengths and their weights are still exact, but D is absent.
        max_bytes: how much the copies may keep for the backward pass at a time. The samples are run in
            parts as small as this takes. What one copy of one sample keeps is taken from the ordinary
            pass of the batch as given, which itself is not bounded; nor is the gradient at one point of
            the stream, in float64, while it is summed up.
        batch_dim: the dimension of the batch's tensors along which the samples lie.
        progress: whether to say on a terminal which part of the samples is being run, if there are
            several.

    Returns:
        Norms and weights of all c_k at h_0 and behind every block, and what was checked. With a
        gradient of exactly 0 at h_0, or one that is not finite, they are NaN, and ``status`` says why.

    Raises:
        MeasureError: what `gradscope.effective_depth` refuses; or one sample does not fit into
            ``max_bytes``.
        LayerError: a pattern matches no module.
        ValueError: ``max_length`` below 0, or ``max_bytes`` below 1.

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
    if max_bytes < 1:
        raise ValueError(
            f"max_bytes={max_bytes}: write the memory that the copies may take, such as 2**31"
        )
    model = unwrapped(model)
    names = branch_names(model, branches)
    blocks = block_of_each(names)
    refuse_coupled_samples(model)
    loss = loss_or_own(loss, batch)
    with undisturbed(model):
        samples = sample_count(batch, batch_dim)
        single = part_of(batch, batch_dim, 0, samples)
        twin = shared_copy(model)
        gradients: dict[int, Tensor] = {}

        def keep(position: int, gradient: Tensor, dim: int) -> None:
            gradients[position] = gradient.detach()

        plain = TrunkRun(twin, names, blocks, None, read=keep)
        with SavedBytes(twin) as saved:
            untagged = plain.gradient(loss, single)
        if untagged is None:
            raise MeasureError(
                f"No gradient path from the loss to the input of {plain.first_block}: something between "
                "them is detached, or runs under no_grad."
            )
        gradients[0] = untagged
        n = len(plain.calls)
        longest = n if max_length is None else min(operator.index(max_length), n)
        sums = StreamSums(
            gradients,
            last=len(plain.block_calls),
            samples=samples,
            lengths=longest + 1,
            whole=longest == n,
        )
        status, chunks, difference = "ok", 0, math.nan
        if not untagged.numel() or not torch.isfinite(untagged).all():
            status = (
                f"the {'gradient there is not finite' if untagged.numel() else 'tensor there is empty'}"
            )
        elif not untagged.any():
            status = "the gradient there is exactly 0 (a zero by construction, or underflow)"
        else:
            chunk = _chunk_size(saved.total, plain, sums, max_bytes)
            chunks, difference = _run_in_chunks(plain, sums, loss, single, batch_dim, chunk, progress)
    checks = SpectrumChecks(
        copies_difference=difference,
        seed_difference=sums.seed_difference,
        sum_difference=sums.check(),
    )
    norm, weight = sums.spectrum()
    return PathSpectrum(
        branches=n,
        granularity=_granularity(plain),
        positions=_positions(plain),
        norm_at=_frozen(norm),
        weight_at=_frozen(weight),
        gradient_l2=sums.gradient_l2(),
        chunks=chunks,
        checks=checks,
        status=status,
    )


def _chunk_size(saved: int, plain: TrunkRun, sums: StreamSums, max_bytes: int) -> int:
    """How many samples fit into the memory at a time, with all their copies."""
    # The tags copy what they stand on, and what follows may keep that instead.
    item = sums.gradients[0].element_size()
    tags = item * sum(shape.numel() for _, shape in (*plain.calls, plain.block_calls[-1]))
    one = math.ceil((saved + tags) / sums.samples * sums.copies)
    if one > max_bytes:
        raise MeasureError(
            f"One sample in {sums.copies} copies, for the lengths 0 to {sums.lengths - 1}, keeps about "
            f"{one} bytes for the backward pass, more than max_bytes={max_bytes}. Write "
            f"max_bytes={one}, or a smaller max_length=, or shorten the samples."
        )
    fitting = min(sums.samples, max_bytes // one)
    # As even as possible: 5 + 5 rather than 9 + 1.
    return math.ceil(sums.samples / math.ceil(sums.samples / fitting))


def _run_in_chunks(
    plain: TrunkRun,
    sums: StreamSums,
    loss: Callable[[Any, Any], Tensor],
    batch: Any,
    dim: int,
    chunk: int,
    progress: bool,
) -> tuple[int, float]:
    """Run the copies of the samples, part by part; how many parts, and how much the copies differ."""
    starts = range(0, sums.samples, chunk)
    # A pass of the copies is read against one of the same samples without copies.
    bare = {sums.samples: plain}
    worst = 0.0
    for number, start in enumerate(starts, 1):
        if progress and len(starts) > 1 and sys.stderr.isatty():
            end = "\n" if number == len(starts) else ""
            print(
                f"\rpath spectrum: part {number} of {len(starts)}", end=end, file=sys.stderr, flush=True
            )
        stop = min(start + chunk, sums.samples)
        part = part_of(batch, dim, start, stop)
        if stop - start not in bare:
            single = TrunkRun(plain.model, plain.branches, plain.blocks, None)
            single.gradient(loss, part)
            if [name for name, _ in single.calls] != [name for name, _ in plain.calls]:
                raise MeasureError(
                    f"{stop - start} samples did not call the same branches as all {sums.samples} of "
                    "them, so that they cannot be measured in parts. Write a larger max_bytes=."
                )
            bare[stop - start] = single
        sums.begin(start, stop)
        run = TrunkRun(
            plain.model,
            plain.branches,
            plain.blocks,
            bare[stop - start],
            copies=sums.copies,
            by_length=True,
            read=sums.add,
        )
        copied = run.gradient(loss, repeated(part, dim, sums.copies))
        assert copied is not None  # the same graph as in the plain pass, and that had a gradient
        worst = max(worst, run.copies_difference)
        sums.add(0, copied, run.input_dim)
    return len(starts), worst


def _positions(run: TrunkRun) -> tuple[str, ...]:
    names = [block for block, _ in run.block_calls]
    often = Counter(names)
    seen: Counter[str] = Counter()
    found = [f"input of {run.first_block}"]
    for name in names:
        seen[name] += 1
        found.append(f"output of {name}" + (f", call {seen[name]}" if often[name] > 1 else ""))
    return tuple(found)


def _granularity(run: TrunkRun) -> str:
    """How many branches one block is cut into; a block that is called again counts as another."""
    branches = Counter(run.blocks[name] for name, _ in run.calls)
    calls = Counter(block for block, _ in run.block_calls)
    each = sorted({branches[block] / calls[block] for block in branches})
    if len(each) == 1:
        return f"{each[0]:.3g} branch{'' if each[0] == 1 else 'es'} per block"
    return f"{each[0]:.3g} to {each[-1]:.3g} branches per block"


def _frozen(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    x.flags.writeable = False
    return x
