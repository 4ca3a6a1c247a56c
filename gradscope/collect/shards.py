"""What a rank holds of a parameter that is sharded over ranks (DTensor, FSDP2).

A norm of a DTensor is asked for without a thought and answered for this rank's shard alone:
``torch.linalg.vector_norm(dtensor).item()`` is local, and no error says so. Everything here is about
the local shard, and says what must be added up over which ranks.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Final, cast

import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["UNKNOWN", "Shard", "copies", "fsdp_groups", "fsdp_shards", "local", "thirds", "unreduced"]

#: `copies` of what is no plain sum over ranks: partial sums, or shards of unknown layout.
UNKNOWN: Final = -1


def _dtensor() -> Any:
    # Not imported where nobody else has: it takes a second.
    module = sys.modules.get("torch.distributed.tensor")
    return None if module is None else module.DTensor


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor, which may be empty; any other tensor itself."""
    if type(tensor) is Tensor or type(tensor) is nn.Parameter:
        return tensor
    kind, whole = _dtensor(), cast("Any", tensor)
    return whole.to_local() if kind is not None and isinstance(tensor, kind) else tensor


def copies(tensor: Tensor | None, ranks: tuple[int, ...]) -> int:
    """How many of these ranks hold the same shard as this one.

    Args:
        tensor: a parameter or a gradient.
        ranks: the ranks that values are added up over.

    Returns:
        0 for a tensor that is whole on every rank, `UNKNOWN` where adding up would be wrong.
    """
    kind = _dtensor()
    if tensor is None or kind is None or not isinstance(tensor, kind):
        return 0
    whole: Any = tensor
    mesh = whole.device_mesh
    if sorted(mesh.mesh.flatten().tolist()) != sorted(ranks):
        return UNKNOWN
    same = 1
    for size, placement in zip(mesh.mesh.shape, whole.placements, strict=True):
        if placement.is_partial():
            return UNKNOWN
        if placement.is_replicate():
            same *= int(size)
    return same


def thirds(tensor: Tensor, axis: int) -> tuple[Tensor, ...]:
    """What this rank holds of each third of a tensor along an axis."""
    kind = _dtensor()
    if kind is None or not isinstance(tensor, kind):
        return tensor.chunk(3, axis)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    whole: Any = tensor
    shape, offset = compute_local_shape_and_global_offset(
        whole.shape, whole.device_mesh, whole.placements
    )
    held, start, third = local(tensor), offset[axis], whole.shape[axis] // 3
    bounds = [min(max(n * third - start, 0), shape[axis]) for n in range(3)] + [shape[axis]]
    return tuple(held.narrow(axis, a, b - a) for a, b in pairwise(bounds))


class Shard:
    """A parameter that FSDP2 manages: between forward and backward another tensor stands in its place.

    Args:
        managed: torch's own record of the parameter; held weakly.
    """

    __slots__ = ("_managed",)

    def __init__(self, managed: Any) -> None:
        self._managed = weakref.ref(managed)

    def tensor(self) -> Tensor | None:
        """The sharded parameter, which the optimizer has and which gets the gradient."""
        managed = self._managed()
        return None if managed is None else managed.sharded_param


def fsdp_groups(model: nn.Module) -> Iterator[Any]:
    """The parameter groups of FSDP2 in a model, each once."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    if "torch.distributed.fsdp._fully_shard._fully_shard" not in sys.modules:
        return
    from torch.distributed.fsdp import FSDPModule

    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            for group in module._get_fsdp_state()._fsdp_param_groups:
                if id(group) not in seen:
                    seen.add(id(group))
                    yield group


def fsdp_shards(model: nn.Module) -> dict[tuple[int, str], Shard]:
    """The parameters that FSDP2 manages, by the identity of the owning module and their name there."""
    found: dict[tuple[int, str], Shard] = {}
    for group in fsdp_groups(model):
        for managed in group.fsdp_params:
            info = managed._module_info
            names = zip(
                (info.module, *info.shared_modules),
                (info.param_name, *info.shared_param_names),
                strict=True,
            )
            for module, name in names:
                found[id(module), name] = Shard(managed)
    return found


def unreduced(model: nn.Module) -> bool:
    """Whether FSDP2 keeps gradients of a backward pass that it was told not to reduce yet."""
    for managed in (p for group in fsdp_groups(model) for p in group.fsdp_params):
        whole = getattr(managed, "_unsharded_param", None)
        if managed.unsharded_accumulated_grad is not None or (
            whole is not None and whole.grad is not None
        ):
            return True
    return False
