"""The ranks of one training agree to pool their values, and exchange them.

Values travel over a process group of gradscope's own (gloo, on the CPU), so that nothing here can meet
a collective of the training's. Ranks agree through torch's store, without waiting: each says at its
first forward that it watches; the first one to finish a step looks whether all do, and its answer binds
all. A rank that does not watch, or leaves early, is therefore never waited for.

A recorded step costs two collectives: the ranks agree on the step and the layout of its rows, and then
gather the rows. They take place when the optimizer has stepped, which all ranks come to.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from gradscope.collect.parallelism import (
    SINGLE,
    UNWRAPPED,
    Parallelism,
    joining,
    parallelism_of,
    reduces,
)
from gradscope.collect.voice import Voice

__all__ = ["LOCAL", "Ranks"]

#: Status of a value that only one rank's share of the batch is in.
LOCAL: Final = "local"
#: So long a rank is waited for; then values are local for the rest of the watch.
TIMEOUT_S: float = 300.0
#: So long a rank may be late for the end of the first step, where no reduction has held the others back.
LATE_S: float = 5.0


@dataclass(frozen=True, slots=True)
class _Agreed:
    """What all ranks know of each other's step."""

    same_layout: bool
    bytes: int


class Ranks:
    """What a recorder knows of the other ranks.

    Args:
        voice: says once why values are local.
        alone: whether a model that is in no wrapper is this process's own: its batch is the whole batch.

    Attributes:
        parallelism: how the model is spread, as of the last forward.
        replicated: whether parameters, and their gradients after a backward pass, are the same on all
            ranks without any doing.
    """

    def __init__(self, voice: Voice, *, alone: bool = False) -> None:
        self.parallelism: Parallelism = SINGLE
        self.replicated = False
        self._alone = alone
        self._voice = voice
        self._key = ""
        self._first = 0
        self._settled = False
        self._aligned = True
        self._given_up = False
        self._group: Any = None

    @property
    def many(self) -> bool:
        """Whether other ranks see other parts of the batch: values of this rank alone are `LOCAL`."""
        return self.parallelism.many

    @property
    def together(self) -> bool:
        """Whether values are pooled."""
        return self._group is not None and self._aligned

    # -- agreement ---------------------------------------------------------------------------------

    def begin(self, model: nn.Module, identity: str, index: int) -> bool:
        """A step begins; whether the parallelism has changed.

        Args:
            model: the watched model.
            identity: what must be the same on all ranks: layers, statistics, cadence.
            index: the number of the step.
        """
        if self._given_up or (self._group is not None and not joining(model)):
            return False
        before, self.parallelism = self.parallelism, parallelism_of(model)
        if self._alone and self.parallelism.kind == UNWRAPPED:
            self.parallelism = SINGLE
        if self.parallelism == before:
            return False
        if self.many and self.parallelism.why:
            self._group = None
            self._say_local()
        elif self.many:
            try:
                self._announce(identity, index)
            except Exception as error:
                self._give_up(f"{type(error).__name__}: {error}")
        return True

    def begin_pass(self, model: nn.Module) -> None:
        """A forward of the model begins."""
        self.replicated = self.parallelism.kind == "DDP" and reduces(model)

    def _announce(self, identity: str, index: int) -> None:
        ranks = self.parallelism.ranks
        text = repr((self.parallelism.kind, ranks, identity)).encode()
        name = hashlib.sha256(text).hexdigest()[:16]
        store, me = _store(), dist.get_rank()
        # Ranks meet in the first round that has no answer yet, however often each has watched before.
        keys = (f"gradscope/{name}/{n}" for n in itertools.count())
        key = next(k for k in keys if not (store.check([f"{k}/answer"]) or store.check([f"{k}/{me}"])))
        store.set(f"{key}/{me}", str(index))
        self._key = key
        self._first = index
        self._settled = False

    def settle(self) -> int:
        """At the end of a step: do all ranks watch? Afterwards `together` says so.

        Returns:
            what is to be added to the number of this step, so that all ranks count alike.
        """
        self._aligned = True
        if self._settled or not self._key:
            return 0
        self._settled = True
        keys = [f"{self._key}/{rank}" for rank in self.parallelism.ranks]
        try:
            store = _store()
            # A backward pass that is reduced has met all ranks already. Without, a rank may be late.
            until = time.monotonic() + (
                0 if self.replicated or self.parallelism.kind != "DDP" else LATE_S
            )
            while not (everyone := store.check(keys)) and time.monotonic() < until:
                time.sleep(0.002)
            answer = "all" if everyone else "some"
            if store.compare_set(f"{self._key}/answer", "", answer) != b"all":
                self._give_up("not every rank watches this model, or not in the same way")
                return 0
            firsts = [int(first) for first in store.multi_get(keys)]
            self._group = self._make_group(store)
        except Exception as error:
            self._give_up(f"{type(error).__name__}: {error}")
            return 0
        # Where one rank continues a file, this first step need not be a recorded one on all ranks.
        self._aligned = len(set(firsts)) == 1
        return max(firsts) - self._first

    def _make_group(self, store: Any) -> Any:
        """A gloo group, once every rank is here: one that has left in between is not waited for."""
        ranks, me = self.parallelism.ranks, dist.get_rank()
        store.set(f"{self._key}/{me}/here", "")
        here = [f"{self._key}/{rank}/here" for rank in ranks]
        until = time.monotonic() + TIMEOUT_S
        while not store.check(here):
            if store.check([f"{self._key}/left"]) or time.monotonic() > until:
                raise RuntimeError("a rank ended its watch before its first step was over")
            time.sleep(0.002)
        prefix = dist.PrefixStore(f"{self._key}/gloo", store)
        wait = timedelta(seconds=TIMEOUT_S)
        return dist.ProcessGroupGloo(prefix, ranks.index(me), len(ranks), wait)

    def _give_up(self, why: str) -> None:
        """For the rest of the watch: a rank that was not there once cannot be counted on."""
        self._given_up = True
        self._group = None
        self.parallelism = replace(self.parallelism, why=why)
        self._say_local()

    def _say_local(self) -> None:
        self._voice.say(
            "local",
            f"gradscope cannot pool values over ranks, and marks them {LOCAL!r}: {self.parallelism.why}. "
            "For values of the whole batch, watch the model on every rank, with the same options, under "
            "DistributedDataParallel or fully_shard.",
        )

    def close(self) -> None:
        """Leave: other ranks that are still waiting for this one stop to."""
        if self._key and not self._settled and dist.is_initialized():
            try:
                _store().compare_set(f"{self._key}/answer", "", "some")
                _store().set(f"{self._key}/left", "")
            except Exception:  # the rank that holds the store may be gone already
                self._key = ""
        self._group = None

    # -- exchange ----------------------------------------------------------------------------------

    def exchange(self, index: int, layout: bytes, rows: bytes | None) -> list[tuple[bytes, bytes]] | None:
        """Gather the rows of all ranks.

        Args:
            index: the number of the step.
            layout: what the rows are.
            rows: their values; None where this rank has none, for an error.

        Returns:
            (layout, rows) of every rank, in order; None where they cannot be pooled.
        """
        if not self.together:
            return None
        try:
            agreed = self._agree(index, layout, rows)
            if agreed is None or rows is None:
                return None
            mine = rows if agreed.same_layout else layout + rows
            head = np.array([len(layout), len(rows)], dtype=np.int64).tobytes()
            found = self._gather(head + mine, agreed.bytes)
        except Exception as error:
            self._give_up(f"{type(error).__name__}: {error}")
            return None
        return [_taken_apart(part, None if not agreed.same_layout else layout) for part in found]

    def _agree(self, index: int, layout: bytes, rows: bytes | None) -> _Agreed | None:
        digest = int.from_bytes(hashlib.sha256(layout).digest()[:7], "big")
        size = 0 if rows is None else len(rows)
        # The largest of x and of -x over all ranks: are they one?
        told = [digest, -digest, index, -index, int(rows is None), size, len(layout) + size]
        numbers = torch.tensor(told, dtype=torch.int64)
        options: Any = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MAX
        self._group.allreduce([numbers], options).wait()
        most, least, last, first, failed, alone, together = numbers.tolist()
        if last != -first:
            raise RuntimeError(f"ranks are at different steps, {-first} to {last}")
        if failed:
            return None
        same = most == -least
        return _Agreed(same, alone if same else together)

    def _gather(self, part: bytes, size: int) -> list[bytes]:
        full = size + 2 * np.dtype(np.int64).itemsize
        mine = torch.frombuffer(bytearray(part.ljust(full, b"\0")), dtype=torch.uint8)
        theirs = [torch.empty_like(mine) for _ in self.parallelism.ranks]
        self._group.allgather([theirs], [mine]).wait()
        return [t.numpy().tobytes() for t in theirs]


def _store() -> Any:
    return torch.distributed.distributed_c10d._get_default_store()


def _taken_apart(part: bytes, layout: bytes | None) -> tuple[bytes, bytes]:
    layout_size, rows_size = np.frombuffer(part[:16], dtype=np.int64).tolist()
    if layout is not None:
        return layout, part[16 : 16 + rows_size]
    return part[16 : 16 + layout_size], part[16 + layout_size : 16 + layout_size + rows_size]
