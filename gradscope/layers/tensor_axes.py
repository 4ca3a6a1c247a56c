"""Which axes of a module's output hold its features and its tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from torch import nn

from gradscope.layers.naming import class_name

__all__ = ["channels_first", "token_axis"]

#: torch's own modules with channels on axis 1, by the numbers of axes of the output for which that holds.
#: By class, not by name: the Conv1D of transformers is a linear layer.
_CHANNELS_FIRST: Final[tuple[tuple[tuple[type[nn.Module], ...], tuple[int, ...]], ...]] = (
    ((nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d, nn.InstanceNorm1d), (3,)),
    ((nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d), (3,)),
    ((nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.InstanceNorm2d, nn.PixelShuffle), (4,)),
    ((nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d), (4,)),
    ((nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d, nn.InstanceNorm3d), (5,)),
    ((nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d), (5,)),
    ((nn.GroupNorm, nn.SyncBatchNorm, nn.Upsample), (3, 4, 5)),
)
#: Layer classes, by the beginning of their names, that compute [tokens, batch, features] unasked.
_TOKENS_FIRST: Final = ("XLNetLayer", "XLNetRelativeAttention", "XLNetFeedForward")


def _around(name: str, modules: dict[str, nn.Module]) -> Iterator[nn.Module]:
    """The module of this name and those that hold it, from the inside out."""
    while True:
        if name in modules:
            yield modules[name]
        if not name:
            return
        name = name.rpartition(".")[0]


def channels_first(name: str, modules: dict[str, nn.Module]) -> tuple[int, ...]:
    """For which numbers of axes the features of a module's output are on axis 1.

    Said by the class of torch's own modules, and by the weight layers inside of all others: those of
    the nearest module around for an activation or a dropout. Convolutions beside linear layers (as in
    ConvNeXt) say it for images only: sequences next to linear layers are [batch, tokens, features].
    """
    own = _own_axes(modules[name])
    if own:
        return own
    for module in _around(name, modules):
        weighty = [m for m in module.modules() if any(True for _ in m.parameters(recurse=False))]
        if weighty:
            axes = {n for m in weighty for n in _own_axes(m) if not isinstance(m, nn.GroupNorm)}
            if any(isinstance(m, nn.Linear | nn.LayerNorm | nn.Embedding) for m in weighty):
                axes.discard(3)
            return tuple(sorted(axes))
    return ()


def _own_axes(module: nn.Module) -> tuple[int, ...]:
    return next((axes for classes, axes in _CHANNELS_FIRST if isinstance(module, classes)), ())


def token_axis(name: str, modules: dict[str, nn.Module]) -> int:
    """0 in and directly around an attention with ``batch_first=False``, else 1."""
    if class_name(modules[name]).startswith(_TOKENS_FIRST):
        return 0
    inside = (m for m in modules[name].modules() if isinstance(m, nn.MultiheadAttention))
    beside = (
        m for p in _around(name, modules) for m in p.children() if isinstance(m, nn.MultiheadAttention)
    )
    attention = next(inside, None) or next(beside, None)
    return 1 if attention is None or attention.batch_first else 0
