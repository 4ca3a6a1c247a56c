"""Where the residual stream of a model runs: its skips, their kind, and the branches beside them.

Nothing is taken on trust from names or classes. One forward pass is run, its autograd graph is read for
what could be a skip (`gradscope.experiment.sublayers`), and each is proved by a gradient that must come
back through it (`gradscope.experiment.skip_proof`). The kinds are those of Vaswani et al. 2017
(arXiv:1706.03762; post-norm), Xiong et al. 2020 (arXiv:2002.04745; pre-norm), Kim et al. 2025
(arXiv:2502.02732; peri-norm), Bachlechner et al. 2020 (arXiv:2003.04887; a scaled branch) and Wang et al.
2022 (arXiv:2203.00555; a scaled skip).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import Tensor, nn

from gradscope.collect.tensors import tensors_in
from gradscope.errors import MeasureError
from gradscope.experiment.batches import loss_or_own, own_batch
from gradscope.experiment.skip_proof import prove
from gradscope.experiment.stream_reader import StreamForward
from gradscope.experiment.sublayers import Sublayer, locate
from gradscope.experiment.untouched import shared_copy, undisturbed, unwrapped

__all__ = ["Architecture", "architecture"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The residual stream of one trunk of a model, as one forward pass shows it.

    Attributes:
        model: the model's class name.
        trunk: the trunk that was read.
        trunks: all trunks of the model; another is read with ``trunk=``.
        blocks: the blocks in the order of their calls; one that is called twice stands here twice.
        sublayers: what the stream consists of, in forward order.
    """

    model: str
    trunk: str
    trunks: tuple[str, ...]
    blocks: tuple[str, ...]
    sublayers: tuple[Sublayer, ...]

    @property
    def branches(self) -> tuple[str, ...]:
        """The modules whose outputs are the branches, in forward order; "" where one is no module's."""
        return tuple(name for sublayer in self.sublayers for name in sublayer.branches)

    @property
    def status(self) -> str:
        """``ok``, or ``unproved`` where it is not known what one of the sublayers is."""
        return "ok" if all(s.status == "ok" for s in self.sublayers) else "unproved"

    def sublayers_of(self, number: int) -> tuple[Sublayer, ...]:
        """The sublayers of the block that was called as the number-th, from 0."""
        block = self.blocks[number]
        call = self.blocks[:number].count(block)
        return tuple(s for s in self.sublayers if (s.block, s.call) == (block, call))

    def __str__(self) -> str:
        n = len(self.branches)
        others = [name for name in self.trunks if name != self.trunk]
        also = f"; other trunks: {', '.join(others)}" if others else ""
        first = (
            f"{self.model}, trunk {self.trunk}: {len(self.blocks)} block{_s(self.blocks)}, {n} "
            f"branch{'es' if n != 1 else ''}{also}"
        )
        last = (
            "proved: without the branches, a random gradient came back as the skip says"
            if any(s.skip for s in self.sublayers)
            else "no skip was proved"
        )
        return "\n".join((first, *self._lines(), last))

    def _lines(self) -> Iterator[str]:
        described = [self._describe(number) for number in range(len(self.blocks))]
        for description, run in groupby(range(len(self.blocks)), key=described.__getitem__):
            numbers = list(run)
            name = self.blocks[numbers[0]]
            last = self.blocks[numbers[-1]]
            if last != name:
                name += f" to {last} ({len(numbers)} blocks)"
            elif len(numbers) > 1:
                name += f" ({len(numbers)} calls)"
            yield f"  {name}: {description}"

    def _describe(self, number: int) -> str:
        parts = [_described(sublayer, self.blocks[number]) for sublayer in self.sublayers_of(number)]
        return "; ".join(parts) or "nothing but moves of the stream, no branch that a gradient crosses"


def _s(things: tuple[Any, ...]) -> str:
    return "" if len(things) == 1 else "s"


def _described(sublayer: Sublayer, block: str) -> str:
    names = [name.removeprefix(f"{block}.") or "(no module's output)" for name in sublayer.branches]
    names = ["the whole block" if name == block else name for name in names]
    if sublayer.status != "ok":
        return f"unproved {' + '.join(names)}, no skip is known: {sublayer.proof}"
    if not sublayer.skip:
        return f"no skip, {' + '.join(names)}"
    kind = sublayer.kind
    if kind in ("scaled", "gated") and sublayer.norm != "no-norm":
        kind += f" {sublayer.norm}"
    factor = "a factor per element" if math.isnan(sublayer.skip_coefficient) else ""
    return f"{kind} {' + '.join(names)}, skip × {factor or f'{sublayer.skip_coefficient:.6g}'} proved"


def architecture(
    model: nn.Module,
    batch: Any,
    loss: Callable[[Any, Any], Tensor] | None = None,
    *,
    trunk: str | None = None,
) -> Architecture:
    """Find the residual branches of an unmodified model, and prove its skips.

    The graph of one forward pass proposes, numbers decide: with the gradients of the branches' outputs
    taken away, a random gradient must come back through the skip as it was, or times the skip's factor.
    What only looks like a skip, such as x·σ(Wx) or F(x) + mean(x), is ``unproved``, as is what a fused
    kernel or a custom function hides; the reason stands in ``proof``.

    The model is left alone: a copy that shares its parameters is run, and the random state is restored.

    Args:
        model: the model. Its copy is run in evaluation mode, where neither dropout nor checkpointing
            stands in the way.
        batch: what the model takes: a mapping of its arguments, a tuple of them, or one tensor.
        loss: ``loss(model, batch)`` → scalar tensor, as for `gradscope.effective_depth`. None: the
            model's own loss, or the sum of its first output; which of them does not change the trunk.
        trunk: which trunk, by name, where there are several (``encoder.block``, ``decoder.block``). None:
            the one that the loss hangs on.

    Returns:
        The sublayers in forward order, with kind, branches, skip and proof. Print it.

    Raises:
        MeasureError: no trunk; several, of which none was chosen; no gradient path through it; or
            reentrant checkpointing hides it.

    >>> from gradscope import reference
    >>> tokens = torch.randint(256, (2, 9))
    >>> print(architecture(reference.Transformer("post_norm", depth=3), tokens))
    Transformer, trunk blocks: 3 blocks, 6 branches
      blocks.0 to blocks.2 (3 blocks): post-norm attention.branch, skip × 1 proved; post-norm \
feed_forward.branch, skip × 1 proved
    proved: without the branches, a random gradient came back as the skip says
    """
    model = unwrapped(model)
    own_loss = _output_sum if loss is None else loss_or_own(loss, batch)
    with undisturbed(model):
        own = own_batch(batch)
        # Neither dropout nor checkpointing belongs to what is looked for, and both are off in eval mode.
        twin = shared_copy(model).eval()
        forward = StreamForward(twin, own_loss, own, trunk=trunk)
        located = locate(forward, twin)
        if not forward.value.requires_grad or any(p.edge is None for p in forward.positions):
            raise MeasureError(
                f"No gradient path runs along the whole of {forward.trunk.name}: something is detached, "
                "or runs under no_grad, and the graph ends there."
            )
        prove(forward, located)
    return Architecture(
        model=type(model).__name__,
        trunk=forward.trunk.name,
        trunks=forward.trunks,
        blocks=tuple(position.block for position in forward.positions[1:]),
        sublayers=tuple(item.sublayer for item in located),
    )


def _output_sum(model: Any, batch: Any) -> Tensor:
    if isinstance(batch, Mapping):
        output = model(**batch)
    else:
        output = model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
    for tensor in tensors_in(output):
        if tensor.is_floating_point() and tensor.requires_grad:
            return tensor if tensor.dim() == 0 else tensor.sum()
    raise MeasureError(
        f"{type(model).__name__} returned no float tensor that a gradient leads through. Write "
        "loss=lambda model, batch: ..., returning a scalar tensor."
    )
