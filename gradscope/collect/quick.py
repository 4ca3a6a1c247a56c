"""The quick way of the hooks, where its extension module was built: see ``_quick.c``.

It takes what nearly every hook of training on a CPU sees, and declines the rest, which the `Sampler` then
measures. Both ways fill the same passes, calls and slots with the same values.
"""

from __future__ import annotations

import weakref
from array import array
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.fx import _symbolic_trace

from gradscope.collect import engine, probes
from gradscope.collect.passes import ARRIVALS, LAST, PAIR, Call, Pass, Slot, TrunkPass
from gradscope.layers import Layer
from gradscope.statistics import ACTIVATION, BRANCH, GRADIENT, SLOW_PAIR, one_pass, ordinary_absences

if TYPE_CHECKING:
    from gradscope.collect.recorder import Recorder

try:
    from gradscope.collect import _quick as _built  # type: ignore[attr-defined]
except ImportError:  # no compiler where it was installed
    _built = None

__all__ = ["available", "quick_way"]

_native: Any = _built


def _columns(of: Sequence[str], names: Collection[str]) -> tuple[int, ...]:
    return tuple(of.index(name) for name in names)


_PAIRS: Final = (*_columns(ACTIVATION, PAIR), *_columns(GRADIENT, PAIR))
#: What says whether anything is around a forward, see `gradscope.collect.engine.in_transform`.
_ASKED: Final = (
    torch.is_grad_enabled,
    torch._C._current_graph_task_id,
    engine.dispatch_modes,
    engine.function_modes,
    peek_interpreter_stack,
    torch._C._get_tracing_state,
    torch._C._is_any_autocast_enabled,
)


#: What a tensor that only counts writes holds.
_EMPTY: Final = tuple(torch.empty(0, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))


def available() -> bool:
    """Whether the extension module was built, and the one of the statistics."""
    return _native is not None and one_pass.available()


def quick_way(
    recorder: Recorder,
    layers: Sequence[Layer],
    *,
    parents: Mapping[int, int | None],
    linear: frozenset[int],
    wanted: Collection[str],
    proofs: dict[Any, Any],
    recomputed: dict[Any, Any],
    dtypes: set[torch.dtype],
    on_autocast: Callable[[Tensor], None],
) -> Any:
    """The quick way of a sampler; None where it was not built, or a chosen statistic needs the other.

    Args:
        recorder: told of gradients; referred to weakly.
        layers: the watched layers.
        parents: the site of the block of each branch.
        linear: sites whose output is that of an `nn.Linear`.
        wanted: the chosen statistics.
        proofs: whether blocks were seen to add their input, by (site, call).
        recomputed: what a checkpoint recomputes now; cleared when a gradient comes.
        dtypes: where to note the dtypes of activations.
        on_autocast: called with a tensor that came under autocast.

    Returns:
        an object with ``begin(pass, slow)``, ``end()`` and ``set_slow(slow)`` around forwards and steps;
        ``forward(site, output)``, ``skips(site)`` and ``gradient(probe, gradient)`` say whether they
        did it.
    """
    if not available():
        return None
    outside, stream = (ordinary_absences(ACTIVATION, stream=s, wanted=wanted) for s in (False, True))
    gradients = [ordinary_absences(GRADIENT, stream=s, wanted=wanted) for s in (False, True)]
    if outside is None or stream is None or None in gradients:
        return None
    block = stream | dict.fromkeys(_columns(ACTIVATION, SLOW_PAIR), "not sampled")
    block |= dict.fromkeys(_columns(ACTIVATION, PAIR), LAST)
    branch = outside | dict.fromkeys(_columns(ACTIVATION, BRANCH), "not sampled")
    sites: list[tuple[bool, bool, bool, int, str, dict[int, str]]] = []
    for site, layer in enumerate(layers):
        parent = parents.get(site)
        absent = block if layer.is_block else branch if layer.branch is not None else outside
        sites.append(
            (
                not layer.channels_first,
                layer.is_block,
                site in linear,
                -1 if parent is None else parent,
                layer.trunk,
                absent,
            )
        )
    slot = Slot(0, array("d"), {})
    return _native.Quick(
        sites=tuple(sites),
        templates=(
            slot,
            Call(0, 0, []),
            TrunkPass(),
            Pass(),
            probes.GradientProbe(recorder, slot, torch.Size()),
        ),
        columns=(len(ACTIVATION), len(GRADIENT)),
        pairs=_PAIRS,
        gradient_absent=tuple(gradients),
        recorder=weakref.ref(recorder),
        arrivals=ARRIVALS,
        proofs=proofs,
        recomputed=recomputed,
        dtypes=dtypes,
        on_autocast=on_autocast,
        last=LAST,
        tensor=Tensor,
        exchange=Tensor.__dlpack_c_exchange_api__,  # type: ignore[attr-defined]
        ordered=OrderedDict,
        array=array,
        functions=_ASKED,
        symbolic=(vars(_symbolic_trace), "_is_fx_tracing_flag"),
        empty=_EMPTY,
    )
