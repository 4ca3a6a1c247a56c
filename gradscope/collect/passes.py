"""What is kept of one forward pass and of what comes back through it: calls, samples, the stream.

Of activations and gradients, only scalars outlive the hook that saw them, but for what `TrunkPass`
holds: the pair of neighbouring stream tensors until the next hook of the trunk, and, on steps with
slow statistics, the trunk's input until the end of the forward pass (for `input_cosine`).
"""

from __future__ import annotations

import itertools
import threading
import weakref
from dataclasses import dataclass, field
from typing import Any, Final

from torch import Tensor

from gradscope.statistics import Values

__all__ = ["ARRIVALS", "LAST", "PAIR", "Call", "Pass", "Slot", "TrunkPass"]

PAIR: Final = ("dot_next", "diff_next_l2")
#: Numbers the gradients of this process in the order in which they come.
ARRIVALS: Final = itertools.count()
LAST: Final = "not supported: the last position has no next"


@dataclass(slots=True, eq=False)
class Slot:
    """One output tensor of a call: its activation statistics, and its gradient's once it has come.

    ``writes`` counts, for a view and until the end of the backward pass, what is written in place to its
    memory, of which it holds nothing. What autograd hands to the hook of a view that was written to is
    but a part of its gradient.

    Of calls in a compiled graph there are rows of numbers first (`gradscope.collect.traced`): ``source``
    is where they come from, ``traced`` what the forward wrote, ``traced_gradient`` what the backward did.
    ``arrival`` orders the slots by when their gradients came.
    """

    site: int
    values: Values
    absent: dict[int, str]
    gradient: Values | None = None
    gradient_absent: dict[int, str] | None = None
    backward: int | None = None
    repeated: bool = False
    stream: bool = False
    successor: Slot | None = None
    trunk: TrunkPass | None = None
    owner: Pass | None = None
    error: str | None = None
    handles: tuple[Any, ...] = ()
    writes: tuple[Tensor, int] | None = None
    source: Any = None
    traced: Any = None
    traced_gradient: Any = None
    arrival: int | None = None

    @property
    def written(self) -> bool:
        """Whether it is a view that was modified in place since it was seen."""
        return self.writes is not None and self.writes[0]._version != self.writes[1]

    def settle(self) -> None:
        """The backward pass is over: what was written in place until then counts."""
        if self.written:
            self.error = "not supported: a view that was modified in place"
        self.writes = None


@dataclass(slots=True, eq=False)
class Call:
    """One call of a watched layer in one forward pass.

    ``site`` is the layer's index, or -1 - t for the input of trunk t. ``block_call`` says during
    which call of its block a branch ran. ``pending`` marks a call without gradient inside a forward
    with: re-entrant checkpointing will run it again in the backward pass. ``time`` orders the calls in
    compiled graphs.
    """

    site: int
    index: int
    slots: list[Slot]
    block_call: int = 0
    pending: bool = False
    unit_skip: bool | None = None
    error: str | None = None
    time: float = 0.0

    def primary(self) -> Slot | None:
        """The first float tensor that received a gradient, else the first."""
        for slot in self.slots:
            if slot.gradient is not None:
                return slot
        return self.slots[0] if self.slots else None


@dataclass(slots=True, eq=False)
class TrunkPass:
    """One trunk in one forward pass: its stream positions in forward order.

    ``reading`` is the block that runs now, if its input is the last position itself; ``read`` is the edge
    of what the last block read.
    """

    calls: list[Call] = field(default_factory=list)
    edges: list[Any] = field(default_factory=list)
    read: Any = None
    branch_edges: dict[int, Any] = field(default_factory=dict)
    unproven: list[int] = field(default_factory=list)
    input: Tensor | None = None
    reading: int | None = None
    held_activation: tuple[Tensor, float, Slot] | None = None
    held_gradient: tuple[Tensor, int, Slot] | None = None

    def drop_forward(self) -> None:
        """Let go of what is held for the forward pass: its tensors and the edges of its graph."""
        self.input = self.held_activation = None
        self.drop_edges()

    def drop_edges(self) -> None:
        """Let go of the edges of its graph: nothing is proved from there on."""
        self.edges, self.branch_edges, self.read = [], {}, None

    def drop(self) -> None:
        """Let go of every tensor."""
        self.held_gradient = None
        self.drop_forward()


@dataclass(slots=True, eq=False, weakref_slot=True)
class Pass:
    """One forward pass and what came back through it.

    ``within`` counts the calls of the model by itself that run now. ``thread`` is the one that its
    forward runs in. ``views`` are the samples of views. ``accumulated`` says that a backward pass through
    it wrote to ``.grad``; ``graph`` holds weak references to hooks that live as long as its graph;
    ``closed`` that its step is over, or that it is of none.
    """

    calls: list[Call] = field(default_factory=list)
    counts: dict[int, int] = field(default_factory=dict)
    trunks: dict[str, TrunkPass] = field(default_factory=dict)
    views: list[Slot] = field(default_factory=list)
    aliases: dict[int, tuple[Any, float, Slot]] = field(default_factory=dict)
    root_open: bool = False
    within: int = 0
    begun: set[int] = field(default_factory=set)
    ended: set[int] = field(default_factory=set)
    loss: Tensor | float | None = None
    scale: Tensor | float | None = None
    valid: Tensor | None = None
    error: str | None = None
    accumulated: bool = False
    graph: list[weakref.ref[Any]] = field(default_factory=list)
    thread: int = field(default_factory=threading.get_ident)
    closed: bool = False

    @property
    def mine(self) -> bool:
        """Whether its forward runs in the thread that asks."""
        return self.thread == threading.get_ident()

    @property
    def elsewhere(self) -> bool:
        """Whether it belongs to another thread that still runs."""
        return not self.mine and self.thread in (t.ident for t in threading.enumerate())

    @property
    def complete(self) -> bool:
        """Forward came to its end, and every backward that began did too."""
        return not self.root_open and self.begun <= self.ended

    def gone(self, site: int) -> bool:
        """Whether it has called this layer and its graph is no more (an evaluation with grad)."""
        if site not in self.counts or not self.graph:
            return False
        for state in self.trunks.values():
            state.drop_edges()  # they keep the graph
        return not any(r() for r in self.graph)

    def end_forward(self) -> None:
        """Its forward has been looked at as a whole: let go of what is held for that."""
        for state in self.trunks.values():
            state.drop_forward()
        self.aliases.clear()

    def _settle_views(self) -> None:
        for slot in self.views:
            slot.settle()
        self.views.clear()

    def end_backward(self, backward: int) -> None:
        """A backward pass through it came to its end."""
        self.ended.add(backward)
        self._settle_views()
        for state in self.trunks.values():
            state.held_gradient = None
            if not self.root_open:
                state.drop_forward()

    def forget(self) -> None:
        """It is of no step: let go of its tensors, its hooks on leaves and its samples."""
        self.close()
        self.calls.clear()

    def close(self) -> None:
        """Its step is over: let go of its tensors, and take its hooks off leaves."""
        self.closed = True
        self._settle_views()
        for state in self.trunks.values():
            state.drop()
        for call in self.calls:
            for slot in call.slots:
                for handle in slot.handles:
                    handle.remove()
                slot.handles = ()
        self.aliases.clear()
