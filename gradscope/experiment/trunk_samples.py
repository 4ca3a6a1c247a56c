"""A batch's gradient over a trunk, whether its samples are independent, and the samples in parts.

The ordinary pass of the whole batch gives the gradient g at every stream position. Half of the samples,
run alone, must give the same values at the trunk's end, and the same gradients up to the one factor by
which the loss sees another batch. Where more is asked of the backward pass than memory allows, the
samples are run in parts: each begins at the trunk's end with its rows of g there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from gradscope.errors import MeasureError
from gradscope.experiment.batches import loss_or_own, part_of, sample_count
from gradscope.experiment.named_branches import named_trunk
from gradscope.experiment.path_sums import SavedBytes
from gradscope.experiment.stream_reader import StreamForward
from gradscope.experiment.trunk_pass import TrunkPass
from gradscope.experiment.untouched import refuse_coupled_samples, shared_copy

__all__ = ["DEFAULT_MAX_BYTES", "ROUNDING", "Checks", "Gradients", "Part", "TrunkSamples"]

#: What a measurement may keep for its backward passes unless max_bytes= says otherwise: 2 GiB.
DEFAULT_MAX_BYTES: Final = 2 * 2**30

#: Largest relative difference of gradients that counts as rounding, by the dtype of the stream. Models in
#: float64 often take their loss and norms in float32 all the same, as those of Hugging Face do.
ROUNDING: Final[Mapping[torch.dtype, float]] = {torch.float64: 1e-5, torch.float32: 1e-4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Checks:
    """What was verified in the same run; each is 0 up to rounding, or the result is refused.

    Attributes:
        values_difference: the largest difference between the values at the trunk's end of half of the
            samples, run alone, and of the same samples in their batch, relative to the largest value.
            NaN for a batch of one sample.
        gradient_difference: ‖a − c·u‖/‖a‖ at the trunk's input, with a the gradient of these samples run
            alone, u that in their batch, and c the one factor by which the loss's reduction sees another
            batch. NaN for one sample.
        sum_difference: ‖Σ_k c_k − g‖/‖g‖ with c_k the parts of the gradient by path length, the worst
            stream position's; NaN where the gradient was not divided into all of them.
    """

    values_difference: float = math.nan
    gradient_difference: float = math.nan
    sum_difference: float = math.nan


@dataclass(frozen=True, slots=True, eq=False)
class Gradients:
    """The gradients of an ordinary backward pass.

    Attributes:
        stream: those at the stream positions, by number, where one arrives; h_0 is number 0.
        branches: those of the branches' outputs, by number.
    """

    stream: dict[int, Tensor]
    branches: dict[int, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Some of the samples, with a pass of their own.

    Attributes:
        run: their pass.
        seed: the gradient at the trunk's end with which their backward passes begin.
        own: their gradients at the stream positions and at the branches; None where they are yet to be
            had.
        samples: how many samples these are.
        dim: the dimension along which they lie at h_0; None for a batch of one.
        number: which part this is, from 1.
        parts: how many there are.
    """

    run: TrunkPass
    seed: Tensor
    own: Gradients | None
    samples: int
    dim: int | None
    number: int = 1
    parts: int = 1

    def called(self, what: str) -> str:
        """What work on this part is called on a terminal."""
        return what if self.parts == 1 else f"{what}, part {self.number} of {self.parts}"

    def by_sample(self, products: Tensor) -> Tensor:
        """Sums of something of the shape of h_0 over all of each sample, [samples]."""
        if self.dim is not None:
            products = products.movedim(self.dim, 0)
        return products.reshape(self.samples, -1).sum(1)

    def gradients(self) -> Gradients:
        """The gradients of these samples, in an ordinary backward pass."""
        return self.own or gradients_of(self.run, self.seed)


def gradients_of(run: TrunkPass, seed: Tensor | None) -> Gradients:
    """What an ordinary backward pass leaves, from the loss or from the trunk's end."""
    found = Gradients({}, {})

    def at_position(number: int, gradient: Tensor) -> Tensor:
        found.stream[number] = gradient.detach()
        return gradient

    def at_branch(number: int, gradient: Tensor) -> Tensor:
        found.branches[number] = gradient.detach()
        return gradient

    run.gradient(seed, at_position=at_position, at_branch=at_branch)
    return found


class TrunkSamples:
    """The ordinary pass of a batch over a trunk, and what follows from it.

    Args:
        model: the model, unwrapped; a copy of it is run.
        batch: the batch.
        loss: the loss, or None for the model's own.
        trunk: the trunk by name, or None.
        modules: the modules that the caller names as branches, or None.
        batch_dim: the dimension of the batch's tensors along which the samples lie.
        seen: a context of the forward pass of the whole batch.

    Attributes:
        plain: the pass of the whole batch.
        gradients: the gradient at each stream position, by number, where one arrives.
        samples: the number of samples.
        checks: what was verified.
        status: ``ok``, or why the gradient at h_0 cannot be divided.

    Raises:
        MeasureError: what `TrunkPass` refuses; a skip that cannot be proved; or samples that influence
            each other.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        loss: Callable[[Any, Any], Tensor] | None,
        *,
        trunk: str | None = None,
        modules: str | Sequence[str] | None = None,
        batch_dim: int = 0,
        seen: AbstractContextManager[Any] | None = None,
    ) -> None:
        self._named = named_trunk(model, modules)
        refuse_coupled_samples(model)
        self._loss = loss_or_own(loss, batch)
        self.samples = sample_count(batch, batch_dim)
        self._batch, self._dim = batch, batch_dim
        self._model = shared_copy(model)
        self._trunk = trunk
        with seen or nullcontext():
            self.plain = self._run(0, self.samples)
        self.plain.prove()
        self._own = gradients_of(self.plain, None)
        self.gradients = self._own.stream
        if 0 not in self.gradients:
            raise MeasureError(
                f"No gradient arrives at the {self.reading_point} although the graph leads there."
            )
        self.checks = Checks()
        #: By stream position, the dimension along which the samples lie; None for a single sample.
        self._sample_dim: list[int | None] = [None] * len(self.plain.forward.positions)
        self._saved = 0.0
        self._graph = True
        g = self.gradients[0]
        self.status = "ok"
        if not g.numel() or not torch.isfinite(g).all():
            self.status = (
                f"the {'gradient there is not finite' if g.numel() else 'tensor there is empty'}"
            )
        elif not g.any():
            self.status = "the gradient there is exactly 0 (a zero by construction, or underflow)"
        elif self.samples > 1:
            self._check_half()

    @property
    def reading_point(self) -> str:
        """Where g is read."""
        return self.plain.forward.position_name(0)

    def parts(self, max_bytes: int, tensors: int) -> Iterator[Part]:
        """Passes of all samples, in parts that keep no more than this for their backward passes.

        Args:
            max_bytes: how much that is.
            tensors: how many gradients of the size of the stream are kept besides.

        Raises:
            MeasureError: one sample keeps more.
        """
        stream = sum(g.numel() * g.element_size() for g in self.gradients.values()) / len(self.gradients)
        one = math.ceil(self._saved + stream * tensors / self.samples)
        if one > max_bytes:
            raise MeasureError(
                f"One sample keeps about {one} bytes for the backward passes, more than "
                f"max_bytes={max_bytes}. Write max_bytes={one}, or a smaller max_length=, or shorten the "
                "samples."
            )
        fitting = min(self.samples, max_bytes // one)
        if fitting == self.samples and self._graph:
            seed = self.gradients[self.plain.last]
            yield Part(self.plain, seed, self._own, self.samples, self._sample_dim[0])
            return
        self.plain.let_go()
        self._own.branches.clear()
        self._graph = False
        # As even as possible: 5 + 5 rather than 9 + 1.
        size = math.ceil(self.samples / math.ceil(self.samples / fitting))
        starts = range(0, self.samples, size)
        for number, start in enumerate(starts, 1):
            part = self._part(start, min(start + size, self.samples))
            yield replace(part, number=number, parts=len(starts))

    def whole(self) -> tuple[nn.Module, Callable[[Any, Any], Tensor], Any, TrunkPass, Gradients]:
        """What the pass of all samples ran, the pass, and its gradients; `parts` may free its graph."""
        batch = part_of(self._batch, self._dim, 0, self.samples)
        return self._model, self._loss, batch, self.plain, self._own

    def _part(self, start: int, stop: int) -> Part:
        run = self._run(start, stop)
        if run.branches != self.plain.branches:
            raise MeasureError(
                f"{stop - start} samples did not call the same branches as all {self.samples} of them, "
                "so that they cannot be measured in parts. Write a larger max_bytes=."
            )

        def rows(gradient: Tensor, position: int) -> Tensor:
            return self._rows(gradient, position, start, stop)

        end = self.plain.last
        self._check_values(run.forward, rows)
        seed = rows(self.gradients[end], end).contiguous()
        return Part(run, seed, None, stop - start, self._sample_dim[0])

    def _run(self, start: int, stop: int) -> TrunkPass:
        part = part_of(self._batch, self._dim, start, stop)
        return TrunkPass(self._model, self._loss, part, trunk=self._trunk, named=self._named)

    def _rows(self, gradient: Tensor, position: int, start: int, stop: int) -> Tensor:
        dim = self._sample_dim[position]
        if dim is None:
            return gradient
        each = gradient.shape[dim] // self.samples
        return gradient.narrow(dim, start * each, (stop - start) * each)

    def _check_half(self) -> None:
        """Half of the samples, run alone, against the same samples in their batch."""
        half = self.samples // 2
        part = part_of(self._batch, self._dim, 0, half)
        with SavedBytes(self._model) as saved:
            forward = StreamForward(self._model, self._loss, part, trunk=self._trunk, named=self._named)
        self._saved = saved.total / half
        self._find_sample_dims(forward, half)

        def rows(gradient: Tensor, position: int) -> Tensor:
            return self._rows(gradient, position, 0, half)

        self._check_values(forward, rows)
        positions = forward.positions
        edges = [position.edge for position in (positions[-1], positions[0])]
        given = [GradientEdge(*edge) for edge in edges if edge is not None]
        if len(given) < 2 or not forward.value.requires_grad:
            raise MeasureError("Half of the samples, run alone, have no gradient path to the loss.")
        end, first = torch.autograd.grad(forward.value, given, allow_unused=True)
        last = self.plain.last
        u_end, u_first = rows(self.gradients[last], last), rows(self.gradients[0], 0)
        if not u_end.any():
            return  # whatever these samples get alone, in their batch it is nothing
        tolerance = ROUNDING[u_end.dtype]
        dtype = str(u_end.dtype).removeprefix("torch.")
        factor, off = _proportional(end, u_end)
        if not (off <= tolerance and factor > 0):
            raise MeasureError(
                f"Half of the samples, run alone, have another gradient at the trunk's end than in their "
                f"batch (relative difference {off:.1e}, allowed {tolerance:.0e} in {dtype}): the loss "
                "compares samples with each other, or weighs them by their place in the batch, or the "
                "gradient is too small for its dtype. Write a loss that is a mean or a sum over samples; "
                "for the dtype, model.double()."
            )
        off = 0.0
        if u_first.any():
            _, off = _proportional(first, u_first, factor)
        if not off <= tolerance:
            raise MeasureError(
                f"Half of the samples, run alone, have another gradient at the {self.reading_point} "
                f"than in their batch (relative difference {off:.1e}, allowed {tolerance:.0e} in "
                f"{dtype}): the samples of a batch influence each other, or something random is active. "
                "Use a model without batch statistics and expert capacity limits; for the dtype, "
                "model.double()."
            )
        self.checks = replace(self.checks, gradient_difference=off)

    def _check_values(self, forward: StreamForward, rows: Callable[[Tensor, int], Tensor]) -> None:
        """The values at the trunk's end are those of the same samples in their batch."""
        whole = self.plain.forward
        if [p.block for p in forward.positions] != [p.block for p in whole.positions]:
            raise MeasureError(
                "Fewer samples did not call the same blocks in the same order as the whole batch: "
                "something random is active, such as layer dropping. Write model.eval()."
            )
        (theirs, _), (all_, number) = forward.end, whole.end
        assert theirs is not None and all_ is not None
        mine = rows(all_, number)
        largest = float(mine.abs().amax()) if mine.numel() else 0.0
        if not largest:
            return
        off = float((theirs.double() - mine.double()).abs().amax()) / largest
        tolerance = ROUNDING[mine.dtype]
        if not off <= tolerance:
            raise MeasureError(
                f"The same samples have different values at the trunk's end alone and in their batch "
                f"(relative difference {off:.1e}, allowed {tolerance:.0e}): the samples of a batch "
                "influence each other, or something random is active, or they do not lie along "
                f"batch_dim={self._dim}. Write model.eval(), and use a model without batch statistics, "
                "expert capacity limits and random layers."
            )
        known = self.checks.values_difference
        worst = off if math.isnan(known) else max(known, off)
        self.checks = replace(self.checks, values_difference=worst)

    def _find_sample_dims(self, forward: StreamForward, half: int) -> None:
        """The dimension along which a position shrank with the batch."""
        whole = self.plain.forward
        for number, (few, all_) in enumerate(zip(forward.positions, whole.positions, strict=False)):
            shapes = list(zip(few.shape, all_.shape, strict=False))
            dims = [i for i, (n, m) in enumerate(shapes) if n != m]
            if (
                len(few.shape) != len(all_.shape)
                or len(dims) != 1
                or shapes[dims[0]][0] * self.samples != shapes[dims[0]][1] * half
            ):
                raise MeasureError(
                    f"With {half} of {self.samples} samples, the {whole.position_name(number)} went from "
                    f"shape {tuple(all_.shape)} to {tuple(few.shape)}: not one dimension shrank with the "
                    "batch, so that the samples cannot be told apart. Is batch_dim= the dimension of the "
                    "samples?"
                )
            self._sample_dim[number] = dims[0]


def _proportional(a: Tensor | None, u: Tensor, factor: float | None = None) -> tuple[float, float]:
    """The factor c for which a = c·u, or one that is given, and ‖a − c·u‖/‖a‖."""
    if a is None or not a.any():
        return math.nan, math.inf
    # In units of the largest entries: the square of a vanished gradient would underflow.
    height, largest = float(a.abs().amax()), float(u.abs().amax())
    x, y = a.detach().double() / height, u.double() / largest
    ratio = float(torch.sum(x * y) / torch.sum(y * y)) if factor is None else factor * largest / height
    off = float(torch.sum((x - ratio * y) ** 2).sqrt() / torch.sum(x * x).sqrt())
    return ratio * height / largest, off
