"""Exact facts: what has no noise, and must be as it was."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from gradscope.analysis.renaming import paired_off
from gradscope.gate.baseline import Baseline, ParameterRow
from gradscope.gate.outcome import Change

__all__ = [
    "SAME_CHECKSUM",
    "Matched",
    "block_of",
    "first_of",
    "match",
    "other_subject",
    "same_values",
    "wrong_facts",
]

#: Two checksums within this are of the same tensor.
SAME_CHECKSUM: Final = 0.01
#: Nats by which loss and gradient may miss the factor between a sum and a mean, over seeds.
_REDUCTION_WITHIN: Final = 0.1


@dataclass(frozen=True, slots=True)
class Matched:
    """The layers of a run beside those of the baseline.

    Attributes:
        run: the run, under the names of the baseline.
        renamed: name in the baseline → name in the run, blocks and parameters.
        removed: parameters that the run lacks.
        added: those that the baseline lacks.
    """

    run: Baseline
    renamed: Mapping[str, str]
    removed: tuple[str, ...]
    added: tuple[str, ...]


def match(baseline: Baseline, run: Baseline) -> Matched:
    """Give the run's layers the baseline's names: blocks by their order, parameters by what they are.

    A parameter whose name is new is taken for one of the same block and shape that is gone: for the one
    with the same values, else with the same last word (``weight``), else of the same module.
    """
    lost_blocks = [b for b in baseline.blocks if b not in run.blocks]
    fresh_blocks = [b for b in run.blocks if b not in baseline.blocks]
    new_name: dict[str, str] = {}
    if len(lost_blocks) == len(fresh_blocks):
        new_name = dict(zip(fresh_blocks, lost_blocks, strict=True))
    own = {name: _moved(name, new_name) for name in run.parameters}
    names = {moved: name for name, moved in own.items()}
    lost = [n for n in baseline.parameters if n not in names]
    fresh = [moved for moved in names if moved not in baseline.parameters]

    def alike(old: str, new: str) -> bool:
        return baseline.parameters[old].shape == run.parameters[names[new]].shape and block_of(
            old, baseline.blocks
        ) == block_of(new, baseline.blocks)

    def equal(old: str, new: str) -> bool:
        a, b = baseline.parameters[old], run.parameters[names[new]]
        return alike(old, new) and not (a.constant or b.constant) and same_values(a, b)

    pairs = paired_off(
        lost,
        fresh,
        equal,
        lambda old, new: alike(old, new) and old.rpartition(".")[2] == new.rpartition(".")[2],
        lambda old, new: alike(old, new) and old.rpartition(".")[0] == new.rpartition(".")[0],
    )
    own |= {names[new]: old for new, old in pairs.items()}
    added = tuple(names[n] for n in fresh if n not in pairs)
    removed = tuple(n for n in lost if n not in pairs.values())
    renamed = {b: r for r, b in {**new_name, **own}.items() if b != r and r not in added}
    return Matched(_renamed(run, {r: b for b, r in renamed.items()}), renamed, removed, added)


def same_values(a: ParameterRow, b: ParameterRow) -> bool:
    """Whether two parameters start with the same values, as far as their checksums say."""
    pairs = list(zip(a.checksum, b.checksum, strict=False))
    return bool(pairs) and all(
        abs(x - y) < SAME_CHECKSUM or (math.isnan(x) and math.isnan(y)) for x, y in pairs
    )


def _moved(name: str, blocks: Mapping[str, str]) -> str:
    for old, new in blocks.items():
        old, new = old.partition(" call ")[0], new.partition(" call ")[0]
        if name.startswith(f"{old}."):
            return new + name.removeprefix(old)
    return name


def block_of(name: str, blocks: Sequence[str]) -> int:
    """Index of the first block that a parameter lies in; −1 for none."""
    found = [
        (-len(b), i)
        for i, b in enumerate(blocks)
        if name.startswith(f"{b.partition(' call ')[0]}.") or name == b
    ]
    return min(found)[1] if found else -1


def _renamed(run: Baseline, names: Mapping[str, str]) -> Baseline:
    if not names:
        return run

    def new(name: str) -> str:
        own, bracket, part = name.partition("[")
        if own.startswith("input of "):
            return f"input of {new(name.removeprefix('input of '))}"
        for old, here in trunks.items():
            if own == old or own.startswith(f"{old}:") or f" {old}.*" in own:
                own = own.replace(old, here, 1)
        return names.get(own, own) + bracket + part

    # Trunks are called after the container of their blocks, and so are the means over blocks.
    trunks = {
        old.rpartition(".")[0]: here.rpartition(".")[0]
        for old, here in names.items()
        if old in run.blocks
    }
    trunks.pop("", None)
    features = tuple(
        replace(item, feature=replace(item.feature, layer=new(item.feature.layer)))
        for item in run.features
    )
    return replace(
        run,
        blocks=tuple(map(new, run.blocks)),
        architecture={new(k): v for k, v in run.architecture.items()},
        parameters={new(k): v for k, v in run.parameters.items()},
        features=features,
        activation={new(k): v for k, v in run.activation.items()},
        output_grad={new(k): v for k, v in run.output_grad.items()},
    )


def other_subject(baseline: Baseline, run: Baseline) -> list[Change]:
    """Why the baseline is of something else; empty where it applies."""
    found = [
        Change(layer=what, feature="fingerprint", expected=old, obtained=new)
        for what in ("batch", "batch tensors", "mode")
        if (old := baseline.fingerprint.get(what, "")) != (new := run.fingerprint.get(what, ""))
    ]
    if baseline.kind != run.kind:
        found.append(
            Change(layer="replicates", feature="fingerprint", expected=baseline.kind, obtained=run.kind)
        )
    if not found:
        found += _reduction(baseline, run)
    if len(baseline.blocks) != len(run.blocks):
        found.append(
            Change(
                layer="blocks",
                feature="architecture",
                expected=baseline.fingerprint.get("blocks", str(len(baseline.blocks))),
                obtained=run.fingerprint.get("blocks", str(len(run.blocks))),
            )
        )
        for names, others, words in (
            (baseline.blocks, run.blocks, ("a block", "removed")),
            (run.blocks, baseline.blocks, ("–", "added")),
        ):
            found += [
                Change(layer=name, feature="architecture", expected=words[0], obtained=words[1])
                for name in names
                if name not in others
            ]
        return found
    for name, old in baseline.parameters.items():
        new = run.parameters.get(name)
        if new is not None and new.shape != old.shape:
            found.append(Change(layer=name, feature="shape", expected=_shape(old), obtained=_shape(new)))
    return found


def _reduction(baseline: Baseline, run: Baseline) -> list[Change]:
    """A loss that became a sum, or a mean: it and all gradients changed by a number of samples."""
    old, new = (float(b.fingerprint.get("loss", "nan")) for b in (baseline, run))
    if not (old * new > 0):
        return []
    factor = math.log(new / old)
    ends = [
        {item.feature.name: item.mean for item in b.features if item.feature.kind == "endpoint"}
        for b in (baseline, run)
    ]
    shifts = [ends[1][n] - x for n, x in ends[0].items() if "gradient" in n and n in ends[1]]
    if not shifts or any(abs(shift - factor) > _REDUCTION_WITHIN for shift in shifts):
        return []
    for tensor in baseline.fingerprint.get("batch tensors", "").split(", "):
        size = 1
        for length in re.findall(r"\d+(?=×|$)", tensor.partition(" ")[2]):
            size *= int(length)
            if size > 2 and abs(abs(factor) - math.log(size)) < _REDUCTION_WITHIN:
                words = ("a mean", "a sum") if factor > 0 else ("a sum", "a mean")
                said = [f"{word} ({value:.4g})" for word, value in zip(words, (old, new), strict=True)]
                return [
                    Change(
                        layer="loss reduction", feature="fingerprint", expected=said[0], obtained=said[1]
                    )
                ]
    return []


def _shape(row: ParameterRow) -> str:
    return "×".join(map(str, row.shape)) or "scalar"


def wrong_facts(baseline: Baseline, matched: Matched) -> list[Change]:
    """Every exact fact that is not as it was, in the order of the forward pass."""
    run, found = matched.run, list[Change]()

    def say(layer: str, feature: str, expected: object, obtained: object) -> None:
        block = block_of(layer, baseline.blocks)
        found.append(
            Change(
                layer=layer, feature=feature, expected=str(expected), obtained=str(obtained), block=block
            )
        )

    for name in matched.removed:
        say(name, "parameter", _shape(baseline.parameters[name]), "removed")
    for name in matched.added:
        say(name, "parameter", "–", f"added, {_shape(run.parameters[name])}")
    for name, old in baseline.parameters.items():
        new = run.parameters.get(name)
        if new is None:
            continue
        if new.trained != old.trained:
            say(name, "requires_grad", old.trained, new.trained)
        elif old.gradient != "mixed" and new.gradient != old.gradient:
            say(name, "gradient", old.gradient, new.gradient)
        elif (
            old.zero_rows is not None
            and new.zero_rows is not None
            and abs(new.zero_rows - old.zero_rows) > 1e-5
        ):
            say(name, "gradient rows that are 0", f"{old.zero_rows:.1%}", f"{new.zero_rows:.1%}")
    if run.nonfinite and not baseline.nonfinite:
        say(_first_nonfinite(baseline, run), "NaN or infinite", "none", "some")
    if baseline.architecture and run.architecture:
        for block, old_kind in baseline.architecture.items():
            new_kind = run.architecture.get(block, "none")
            if new_kind != old_kind and "unproved" not in old_kind + new_kind:
                say(block, "skip and norm", old_kind, new_kind)
    now = {item.feature.name: item for item in run.features}
    for item in baseline.features:
        other = now.get(item.feature.name)
        if other is None or item.feature.kind == "mean" or "mixed" in (item.state, other.state):
            continue
        if item.state != other.state and {item.state, other.state} & {"zero", "not finite"}:
            say(item.feature.layer, item.feature.kind, item.state, other.state)
    return found


def _first_nonfinite(baseline: Baseline, run: Baseline) -> str:
    """Where NaN and infinities begin: the first activation, else the gradient nearest the loss."""
    now = {item.feature.name: item.state for item in run.features}
    lost = [
        x.feature
        for x in baseline.features
        if x.state == "value" and now.get(x.feature.name, "absent") not in ("value", "zero")
    ]
    ends = [x.layer for x in lost if x.kind == "endpoint"]
    start = [layer for layer in ends if "activation" in layer]
    forward = [x for x in lost if x.kind in ("act", "upd")]
    if start or forward:
        return start[0] if start else min(forward, key=lambda x: x.block).layer
    backward = [x for x in lost if x.kind in ("flow", "gup")]
    backward = backward or [x for x in lost if x.kind == "param_grad"]
    if ends or not backward:
        return ends[0] if ends else "the model"
    return max(backward, key=lambda x: x.block).layer


def first_of(changes: Sequence[Change], blocks: Sequence[str]) -> str:
    """Where exact facts depart: the first block, the one nearest the loss for what has no gradient.

    A gradient that is cut is missing everywhere in front of the cut.
    """
    inside = [c for c in changes if c.block >= 0]
    if not inside:
        return changes[0].layer if changes else ""
    forward = [c for c in inside if c.feature in ("skip and norm", "parameter", "requires_grad")]
    departing = {c.block for c in inside}
    last = max(departing)
    if not forward and departing == set(range(last + 1)) and last + 1 < len(blocks):
        return blocks[last]
    if 2 * len(departing) >= len(blocks) > 1 and len({c.block for c in forward}) != 1:
        return f"{len(departing)} of {len(blocks)} blocks"
    if forward:
        return blocks[min(c.block for c in forward)]
    return blocks[last]
