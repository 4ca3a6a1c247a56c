"""The samples of one step on one rank, as they travel, and those of all ranks as one batch.

Output gradients are those of each rank's own loss. Under DDP and FSDP2 the loss that is trained on is
the mean of the ranks' losses, so that its gradient at a sample is this rank's divided by their number.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from gradscope.collect.passes import PAIR
from gradscope.collect.places import agreed, other_successors
from gradscope.collect.ranks import LOCAL
from gradscope.collect.shards import UNKNOWN
from gradscope.record import STATISTICS
from gradscope.record.steps import coded
from gradscope.statistics import ACTIVATION, GRADIENT, SLOW_PAIR, pool

__all__ = ["COLUMNS", "TO_NEXT", "Samples", "merged", "packed", "unpacked"]

_A: Final = len(ACTIVATION)
COLUMNS: Final = tuple(("activation", n) for n in ACTIVATION) + tuple(
    ("output_grad", n) for n in GRADIENT
)
_POWER: Final = np.array([{"signal": 1, "signal^2": 2}.get(STATISTICS[n].unit, 0) for n in GRADIENT])
_COUNT: Final = (ACTIVATION.index("count"), _A + GRADIENT.index("count"))
_BETWEEN_SAMPLES: Final = np.array([n == "sample_dot" for _, n in COLUMNS])
#: The statistics of a stream position and the next one.
TO_NEXT: Final = np.array([n in (*PAIR, *SLOW_PAIR, "unit_skip") for _, n in COLUMNS])
#: Statuses that say that one rank's share is too small, or of one of its tokens.
_ONE: Final = "one element"
_ZERO: Final = "zero token"
#: How far the same norm may lie apart on two machines.
_SAME: Final = 1e-5

Key = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Samples:
    """One step's values before they become rows.

    Attributes:
        keys: (site, call) of each layer's call, see `gradscope.collect.passes.Call`.
        places: trunk and depth of those on the axis.
        value: [keys, columns].
        why: [keys, columns], "" for ok.
        parameter_value: one for each of the assembler's parameter rows.
        parameter_why: the same, "" for ok.
        loss: the loss, where it was seen.
        scale: the gradient scaler's factor.
        following: for other ranks, the next stream position of those that have one.
        identity: for other ranks, what must be the same on all: see the assembler's.
        copies: for other ranks, how many hold the same shard, by parameter row; 0: whole on every rank.
    """

    keys: list[Key]
    places: dict[Key, tuple[str, float]]
    value: np.ndarray
    why: np.ndarray
    parameter_value: np.ndarray
    parameter_why: np.ndarray
    loss: float | None = None
    scale: float | None = None
    following: dict[Key, Key] = field(default_factory=dict)
    identity: str = ""
    copies: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    @property
    def called(self) -> np.ndarray:
        """[keys]: whether this rank called it."""
        absent = np.isin(self.why[:, 0], ("not called", "compiled")) & np.isnan(self.value[:, 0])
        return ~absent


# -- to bytes and back -----------------------------------------------------------------------------


def packed(samples: Samples) -> tuple[bytes, bytes]:
    """(layout, rows): what each value is, which is the same in most steps, and the values."""
    layout = {
        "keys": samples.keys,
        "places": [[*k, *v] for k, v in samples.places.items()],
        "following": [[*k, *v] for k, v in samples.following.items()],
        "copies": samples.copies.tolist(),
        "identity": samples.identity,
    }
    codes, words = coded(np.concatenate([samples.why.reshape(-1), samples.parameter_why]))
    # The word for a value that is there is "" until it becomes a row.
    said = {"words": ["", *words[1:]], "loss": samples.loss, "scale": samples.scale}
    head = json.dumps(said).encode()
    numbers = np.concatenate([samples.value.reshape(-1), samples.parameter_value])
    parts = [np.int64(len(head)).tobytes(), head, numbers.tobytes(), codes.tobytes()]
    return json.dumps(layout).encode(), b"".join(parts)


def unpacked(layout: bytes, rows: bytes) -> Samples:
    """What `packed` made two byte strings of."""
    said = json.loads(layout)
    keys = [(int(s), int(c)) for s, c in said["keys"]]
    copies = np.array(said["copies"], dtype=np.int64)
    start = 8 + int(np.frombuffer(rows[:8], dtype=np.int64)[0])
    head = json.loads(rows[8:start])
    cells = len(keys) * len(COLUMNS)
    count = cells + len(copies)
    numbers = np.frombuffer(rows, dtype=np.float64, count=count, offset=start) if count else np.empty(0)
    codes = np.frombuffer(rows[start + 8 * count :], dtype=np.uint8)
    why = np.array(head["words"], dtype=object)[codes]
    shape = (len(keys), len(COLUMNS))
    return Samples(
        keys=keys,
        places={(s, c): (trunk, depth) for s, c, trunk, depth in said["places"]},
        following={(s, c): (s2, c2) for s, c, s2, c2 in said["following"]},
        value=numbers[:cells].reshape(shape),
        why=why[:cells].reshape(shape),
        parameter_value=numbers[cells:],
        parameter_why=why[cells:],
        copies=copies,
        identity=said["identity"],
        loss=head["loss"],
        scale=head["scale"],
    )


# -- all ranks as one batch --------------------------------------------------------------------------


def merged(ranks: Sequence[Samples], norms: np.ndarray, sums: np.ndarray) -> Samples:
    """The samples of the whole batch.

    Args:
        ranks: those of every rank, in order.
        norms: which parameter rows are norms.
        sums: which of them are counts that add up over shards.
    """
    keys = _all_keys(ranks)
    value, why, called = _side_by_side(ranks, keys)
    value[:, :, _A:] /= float(len(ranks)) ** _POWER
    pooled = np.concatenate([pool(ACTIVATION, value[..., :_A]), pool(GRADIENT, value[..., _A:])], axis=-1)
    reason = _reasons(why, called, pooled)
    present = reason == ""
    reason[present & _BETWEEN_SAMPLES & ~np.isnan(pooled)] = LOCAL
    reason[np.ix_(_other_successors(ranks, keys), TO_NEXT)] = LOCAL
    parameter_value, parameter_why = _parameters(ranks, norms, sums)
    losses = [r.loss for r in ranks if r.loss is not None]
    places: dict[Key, tuple[str, float]] = {}
    for r in ranks:
        ours = {k for k, called in zip(r.keys, r.called, strict=True) if called}
        places.update(agreed(places, {k: v for k, v in r.places.items() if k in ours}))
    for r in ranks:
        places.update({k: v for k, v in r.places.items() if k not in places})
    following: dict[Key, Key] = {}
    for r in ranks:
        following = {**r.following, **following}
    return replace(
        ranks[0],
        keys=keys,
        places=places,
        following=following,
        value=pooled,
        why=reason,
        parameter_value=parameter_value,
        parameter_why=parameter_why,
        loss=sum(losses) / len(losses) if losses else None,
    )


def _all_keys(ranks: Sequence[Samples]) -> list[Key]:
    """The calls of all ranks, in the order that one rank has them in: inputs first, then by site."""
    every = dict.fromkeys(k for r in ranks for k in r.keys)
    inputs = sorted((k for k in every if k[0] < 0), reverse=True)
    return inputs + sorted(k for k in every if k[0] >= 0)


def _side_by_side(ranks: Sequence[Samples], keys: list[Key]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values and statuses [ranks, keys, columns], and which rank called what, [ranks, keys]."""
    value = np.full((len(ranks), len(keys), len(COLUMNS)), np.nan)
    why = np.full(value.shape, "not called", dtype=object)
    called = np.zeros(value.shape[:2], dtype=bool)
    at = {k: i for i, k in enumerate(keys)}
    for n, r in enumerate(ranks):
        if not r.keys:
            continue
        place = slice(None) if r.keys == keys else [at[k] for k in r.keys]
        value[n, place], why[n, place], called[n, place] = r.value, r.why, r.called
    return value, why, called


def _reasons(why: np.ndarray, called: np.ndarray, pooled: np.ndarray) -> np.ndarray:
    """[keys, columns]: why a value of the whole batch is absent. Only ranks that called it are asked."""
    first = np.argmax(called, axis=0)
    reason = np.take_along_axis(why, first[None, :, None], axis=0)[0]
    differs = ((why != reason) & called[..., None]).any(0) | (reason == _ONE)
    for k, c in zip(*np.nonzero(differs), strict=True):
        reason[k, c] = _of_several(why[called[:, k], k, c].tolist())
        count = pooled[k, _COUNT[c >= _A]]
        if reason[k, c] == _ONE and count > 1:
            reason[k, c] = ""
    return reason


def _of_several(words: list[str]) -> str:
    left = {w for w in words if w != _ONE}
    if not left:
        return _ONE
    errors = sorted(w for w in left if w.startswith("error"))
    if errors:
        return errors[0]
    if len(left) == 1:
        return left.pop()
    # One token without a direction is one in the whole batch, too.
    return _ZERO if left == {"", _ZERO} else LOCAL


def _other_successors(ranks: Sequence[Samples], keys: list[Key]) -> np.ndarray:
    """[keys]: whether not all ranks have the same two positions of a pair (LayerDrop)."""
    called = [{k for k, called in zip(r.keys, r.called, strict=True) if called} for r in ranks]
    following = [r.following for r in ranks]
    if all(c == called[0] for c in called) and all(f == following[0] for f in following):
        return np.zeros(len(keys), dtype=bool)
    return np.array([other_successors(key, following, called) for key in keys], dtype=bool)


def _parameters(
    ranks: Sequence[Samples], norms: np.ndarray, sums: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Values and statuses of parameters: shards are added up, and copies must be the same."""
    value = np.stack([r.parameter_value for r in ranks])
    why = np.stack([r.parameter_why for r in ranks])
    copies = ranks[0].copies
    reason = why[0].copy()
    with np.errstate(invalid="ignore", over="ignore"):
        largest = np.nanmax(np.where(np.isnan(value), -np.inf, np.abs(value)), axis=0)
        scale = np.where((largest > 0) & np.isfinite(largest), largest, 1.0)
        held = np.where(copies > 0, copies, 1)
        together = scale * np.sqrt(np.square(value / scale).sum(0) / held)
        close = np.abs(value - value[0]) <= _SAME * np.abs(value[0])
    same = (close | (value == value[0]) | (np.isnan(value) & np.isnan(value[0]))).all(0)
    found = np.where((copies > 0) & norms, together, value[0])
    found = np.where((copies > 0) & sums, value.sum(0) / held, found)
    # Of what is whole on every rank, ranks with different norms have not reduced their gradients.
    reason[(copies == 0) & ~same & (reason == "")] = LOCAL
    reason[(copies == UNKNOWN) & (norms | sums) & (reason == "")] = LOCAL
    reason[(why != why[0]).any(0)] = LOCAL
    return found, reason
