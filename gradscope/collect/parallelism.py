"""How a model is spread over ranks, as far as torch's own wrappers say so."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Final

import torch.distributed as dist
from torch import nn

from gradscope.collect import shards

__all__ = ["SINGLE", "UNWRAPPED", "Parallelism", "among_ranks", "joining", "parallelism_of", "reduces"]


@dataclass(frozen=True, slots=True)
class Parallelism:
    """Over which ranks a step's values are pooled.

    Attributes:
        kind: for the header: ``single process``, ``DDP``, ``FSDP2`` or ``several processes``.
        ranks: the global ranks that see parts of one batch; only this one where that is unknown.
        why: why values cannot be pooled; "" where they can.
    """

    kind: str
    ranks: tuple[int, ...] = (0,)
    why: str = ""

    @property
    def many(self) -> bool:
        """Whether other processes belong to this training."""
        return self.kind != "single process"

    def __str__(self) -> str:
        if not self.many:
            return self.kind
        if self.why:
            return f"{self.kind}, {dist.get_world_size()} ranks, local values"
        return f"{self.kind}, {len(self.ranks)} ranks"


#: The kind of a model that no wrapper of torch's ties to other processes.
UNWRAPPED: Final = "several processes"
SINGLE: Final = Parallelism("single process")


def parallelism_of(model: nn.Module) -> Parallelism:
    """What the model is under now, while its forward begins: inside of DDP's, where there is one."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return SINGLE
    me = (dist.get_rank(),)
    if _in_pipeline():
        return Parallelism("pipeline parallel", me, "a stage sees its micro-batches of the schedule only")
    fsdp1 = any(
        c.__name__ == "FullyShardedDataParallel" for m in model.modules() for c in type(m).__mro__
    )
    if fsdp1:
        return Parallelism("FSDP1", me, "FSDP's first version keeps flat parameters; use fully_shard")
    meshes = {g.mesh_info.mesh for g in shards.fsdp_groups(model)}
    wrapper = _ddp_around(model)
    if meshes and wrapper is None:
        return _fsdp2(model, meshes, me)
    tensor_parallel = any(shards.copies(p, me) for p in model.parameters())
    if tensor_parallel or meshes:
        return Parallelism("tensor parallel", me, "parameters are DTensors that FSDP2 does not manage")
    if wrapper is None:
        return Parallelism(
            UNWRAPPED,
            me,
            "the model is neither in DistributedDataParallel nor under fully_shard",
        )
    if joining(model):
        return Parallelism("DDP", me, "inside of DDP's join(), ranks that are out of data do not answer")
    ranks = tuple(dist.get_process_group_ranks(wrapper.process_group))
    return Parallelism("DDP", ranks) if len(ranks) > 1 else SINGLE


def among_ranks() -> bool:
    """Whether this process is one of several ranks, or was started as one (``torchrun``)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size() > 1
    return os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1")


def _in_pipeline() -> bool:
    """Whether a stage of a pipeline runs the model: no wrapper shows it, and it divides ``.grad``."""
    stage = "torch.distributed.pipelining.stage"
    if stage not in sys.modules:
        return False
    frame = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == stage:
            return True
        frame = frame.f_back
    return False


def joining(model: nn.Module) -> bool:
    """Whether the model runs inside of DDP's ``join()``."""
    wrapper = _ddp_around(model)
    return wrapper is not None and bool(wrapper._join_config.enable)


def reduces(model: nn.Module) -> bool:
    """Whether the backward pass of the forward that begins will leave DDP's mean in every ``.grad``."""
    wrapper = _ddp_around(model)
    return wrapper is not None and wrapper.require_backward_grad_sync and not wrapper.parameters_to_ignore


def _ddp_around(model: nn.Module) -> nn.parallel.DistributedDataParallel | None:
    ddp = nn.parallel.DistributedDataParallel
    if isinstance(model, ddp):
        return model
    inner = getattr(model, "_orig_mod", None)
    if isinstance(inner, ddp):
        return inner
    active = ddp._get_active_ddp_module()
    inside = active is not None and any(m is model for m in active.modules())
    return active if inside else None


def _fsdp2(model: nn.Module, meshes: set[object], me: tuple[int, ...]) -> Parallelism:
    found = {tuple(mesh.mesh.flatten().tolist()) for mesh in meshes}  # type: ignore[attr-defined]
    if len(found) > 1:
        return Parallelism("FSDP2", me, "its modules are sharded over different ranks")
    ranks: tuple[int, ...] = found.pop()
    for group in shards.fsdp_groups(model):
        if group.gradient_divide_factor not in (None, len(ranks)):
            return Parallelism(
                "FSDP2", me, "its gradients are no means over ranks (a divide factor is set)"
            )
        for managed in group.fsdp_params:
            if shards.copies(managed.sharded_param, ranks) == shards.UNKNOWN:
                return Parallelism("FSDP2", me, "parameters are sharded along other axes, too")
    return Parallelism("FSDP2", ranks) if len(ranks) > 1 else SINGLE
