"""Parameters as a recorder sees them: gradients before clipping and at the step, weights, updates."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from gradscope import statistics
from gradscope.collect.shards import Shard, fsdp_shards, local, thirds
from gradscope.layers import named_layers
from gradscope.record import STATISTICS
from gradscope.statistics import Absent, Value

__all__ = ["PARAM_GRAD", "UPDATE", "WEIGHT", "Held", "ParameterEntry", "Parameters"]

PARAM_GRAD: Final = tuple(n for n, s in STATISTICS.items() if "param_grad" in s.signals)
WEIGHT: Final = tuple(n for n, s in STATISTICS.items() if "weight" in s.signals)
UPDATE: Final = tuple(n for n, s in STATISTICS.items() if "update" in s.signals)
_THIRDS: Final = ("query_l2", "key_l2", "value_l2")


@dataclass(slots=True)
class ParameterEntry:
    """One parameter, found again at each reading through the module that owns it.

    Attributes:
        name: its clean name.
        owner: the owning module's clean name.
        attribute: its name in the owner.
        module: weak reference to the owner.
        packing: the axis along which query, key and value lie one after the other; None otherwise.
        shard: what stands behind it under FSDP2, which puts another tensor in its place in a forward.
    """

    name: str
    owner: str
    attribute: str
    module: weakref.ref[nn.Module]
    packing: int | None
    shard: Shard | None = None

    def tensor(self) -> Tensor | None:
        """The parameter as it is now; None when it is gone."""
        if self.shard is not None:
            return self.shard.tensor()
        owner = self.module()
        return None if owner is None else _parameter(owner, self.attribute)


@dataclass(slots=True)
class Readings:
    """What was read of the parameters in one step, by column; each list is parallel to the entries."""

    gradient: dict[str, list[Value]] = field(default_factory=dict)
    absent: dict[int, str] = field(default_factory=dict)
    at_step: dict[int, Value] = field(default_factory=dict)
    weight: dict[int, Value] = field(default_factory=dict)
    update: dict[int, Value] = field(default_factory=dict)
    scale: float | Tensor | None = None


class Held(NamedTuple):
    """All parameters as they are at one moment, and their ``.grad``; None where there is none.

    For use at once: whoever keeps it keeps the tensors.
    """

    parameters: list[Tensor | None]
    gradients: list[Tensor | None]


class Parameters:
    """The parameters of a model, each once, by clean name.

    Attributes:
        entries: one for each.
        sharded: whether FSDP2 manages any.
    """

    def __init__(self, model: nn.Module) -> None:
        self.entries: list[ParameterEntry] = []
        self.sharded = False
        self._tied: list[tuple[weakref.ref[nn.Module], str, int]] = []
        seen: dict[int, int] = {}
        for owner, module in named_layers(model).items():
            for attribute, parameter in module._parameters.items():
                if parameter is None:
                    continue
                first = seen.setdefault(id(parameter), len(self.entries))
                if first < len(self.entries):
                    self._tied.append((weakref.ref(module), attribute, first))
                    continue
                self.entries.append(
                    ParameterEntry(
                        name=f"{owner}.{attribute}" if owner else attribute,
                        owner=owner,
                        attribute=attribute,
                        module=weakref.ref(module),
                        packing=_packing(owner, module, attribute, parameter),
                    )
                )
        self._look_up()

    def _look_up(self) -> None:
        self._places = [(entry.module, entry.attribute) for entry in self.entries]
        self._packed = [i for i, entry in enumerate(self.entries) if entry.packing is not None]

    def part(self, indices: list[int]) -> Parameters:
        """Some of them, in this order."""
        found = copy.copy(self)
        found.entries = [self.entries[i] for i in indices]
        found._look_up()
        return found

    def tensors(self) -> list[Tensor | None]:
        """All of them as they are now; None where one is gone."""
        if self.sharded:
            return [entry.tensor() for entry in self.entries]
        modules = ((reference(), attribute) for reference, attribute in self._places)
        return [None if m is None else _parameter(m, attribute) for m, attribute in modules]

    def held(self) -> Held:
        """All of them as they are now, with their gradients."""
        tensors = self.tensors()
        return Held(tensors, [None if p is None else p.grad for p in tensors])

    def retied(self, index: Mapping[int, int]) -> bool:
        """Whether two parameters have become one since, or one has become two.

        Args:
            index: what `index` gives now.
        """
        if self.sharded:
            return False
        if len(index) < len(self.entries) and self._shares():
            return True
        for reference, attribute, first in self._tied:
            module = reference()
            other = None if module is None else _parameter(module, attribute)
            if other is not None and index.get(id(other)) != first:
                return True
        return False

    def _shares(self) -> bool:
        present = [id(tensor) for tensor in self.tensors() if tensor is not None]
        return len(set(present)) < len(present)

    def find_shards(self, model: nn.Module) -> None:
        """Look again which parameters FSDP2 manages."""
        shards = fsdp_shards(model)
        if not shards and not self.sharded:
            return
        self.sharded = bool(shards)
        for entry in self.entries:
            module = entry.module()
            entry.shard = None if module is None else shards.get((id(module), entry.attribute))

    def index(self) -> dict[int, int]:
        """The numbers of the entries by the identity of their tensors as they are now."""
        tensors = self.tensors()
        return dict(zip(map(id, tensors), range(len(tensors)), strict=True))

    def read_gradients(self, scale: float | Tensor | None, held: Held | None = None) -> Readings:
        """The norms of all ``.grad`` as they are now, or why there is none; of shards, this rank's.

        Args:
            scale: what the loss was scaled by.
            held: what they are now, where somebody has just looked.
        """
        parameters, whole = self.held() if held is None else held
        readings = Readings(scale=scale)
        values: dict[str, list[Any]] = {name: [math.nan] * len(parameters) for name in PARAM_GRAD}
        readings.gradient = values
        values["count"] = [math.nan if p is None else float(p.numel()) for p in parameters]
        present: list[int] = []
        for i, (parameter, gradient) in enumerate(zip(parameters, whole, strict=True)):
            if gradient is not None and parameter is not None and parameter.requires_grad:
                present.append(i)
            elif parameter is None:
                readings.absent[i] = "not called"
            else:
                readings.absent[i] = "no gradient path" if parameter.requires_grad else "frozen"
        gradients = {i: local(gradient) for i in present if (gradient := whole[i]) is not None}
        norms, bad = values["l2"], values["nonfinite"]
        for i, norm in zip(present, statistics.norms([*gradients.values()]), strict=True):
            norms[i] = norm
            if type(norm) is float and math.isfinite(norm):
                bad[i] = 0.0
            else:
                count = statistics.nonfinite(gradients[i], norm)
                bad[i] = math.nan if isinstance(count, Absent) else count
        for i in self._packed:
            packing, gradient = self.entries[i].packing, whole[i]
            if gradient is not None and packing is not None and i in gradients:
                if gradients[i].layout == torch.strided:
                    parts = statistics.norms(thirds(gradient, packing))
                    for name, part in zip(_THIRDS, parts, strict=True):
                        values[name][i] = part
        return readings

    def norms(self, indices: list[int], *, gradient: bool = False) -> dict[int, Value]:
        """The norms of these parameters, or of their gradients where there is one: this rank's shards."""
        tensors: list[Tensor] = []
        at: list[int] = []
        everything = self.tensors()
        for i in indices:
            parameter = everything[i]
            value = parameter if parameter is None or not gradient else parameter.grad
            if value is not None:
                at.append(i)
                tensors.append(local(value))
        return dict(zip(at, statistics.norms(tensors), strict=True))

    def snapshot(self, indices: list[int]) -> dict[int, Tensor]:
        """Copies of these parameters, to be compared and freed right after the optimizer's step."""
        everything = self.tensors()
        found = {i: everything[i] for i in indices}
        return {
            i: local(p.detach()).clone() for i, p in found.items() if p is not None and p.requires_grad
        }

    def changes(self, before: dict[int, Tensor]) -> dict[int, Value]:
        """Norms of the change of each parameter since its snapshot, which is used up."""
        everything = self.tensors()
        now: dict[int, Tensor] = {}
        for i, snapshot in before.items():
            parameter = everything[i]
            tensor = None if parameter is None else local(parameter.detach())
            if tensor is not None and tensor.shape == snapshot.shape:
                now[i] = tensor
        distances = statistics.distances([before[i] for i in now], list(now.values()))
        before.clear()
        return dict(zip(now, distances, strict=True))


def _parameter(module: nn.Module, attribute: str) -> Tensor | None:
    held = module._parameters  # of a scripted module, no dictionary
    return held[attribute] if attribute in held else None


def _packing(owner: str, module: nn.Module, attribute: str, parameter: Tensor) -> int | None:
    if isinstance(module, nn.MultiheadAttention) and attribute == "in_proj_weight":
        return 0
    # transformers' Conv1D keeps [in, out]; GPT-2's c_attn holds query, key and value side by side.
    attention = owner.rpartition(".")[2] == "c_attn"  # and no feed-forward layer of three times the width
    if attention and type(module).__name__ == "Conv1D" and attribute == "weight" and parameter.dim() == 2:
        return 1 if parameter.shape[1] == 3 * parameter.shape[0] else None
    return None
