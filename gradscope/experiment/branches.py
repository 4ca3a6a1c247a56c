"""Which modules are the residual branches of a model, and which block holds each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from gradscope.errors import LayerError, MeasureError
from gradscope.layers import select

__all__ = ["block_of_each", "branch_names"]


def branch_names(model: nn.Module, branches: str | Sequence[str] | None) -> tuple[str, ...]:
    """The names of the branches, in definition order.

    Args:
        model: the model.
        branches: names or globs; None for what the model's own attribute ``branches`` says.

    Raises:
        MeasureError: none are named, or one lies inside another.
        LayerError: a pattern matches no module.
    """
    if branches is None:
        own: Any = getattr(model, "branches", None)
        if not own or type(own) is not tuple or not all(type(name) is str for name in cast(Any, own)):
            raise MeasureError(
                f"The residual branches of {type(model).__name__} are not known. Name the modules whose "
                'outputs are added to the stream: branches=["blocks.*.attention", "blocks.*.mlp"]'
            )
        branches = cast(tuple[str, ...], own)
    patterns = [branches] if isinstance(branches, str) else list(branches)
    if not patterns:
        raise MeasureError('branches= is empty. Name them: branches=["blocks.*.attention"]')
    try:
        # The model itself, which has no name, matches "*" but is no branch of itself.
        names = tuple(layer.name for layer, _ in select(model, patterns) if layer.name)
    except LayerError as error:
        raise LayerError(str(error).replace("layers=", "branches=", 1)) from None
    if not names:
        raise LayerError(f"branches={branches!r} matches the model itself alone: name modules inside it.")
    for outer in names:
        inner = next((name for name in names if name.startswith(f"{outer}.")), None)
        if inner is not None:
            raise MeasureError(
                f"The branch {inner} lies inside the branch {outer}: its "
                "paths would be counted twice. Name one of the two."
            )
    return names


def block_of_each(branches: tuple[str, ...]) -> dict[str, str]:
    """The block of each branch: the numbered child, of the innermost common container, that holds it.

    Raises:
        MeasureError: the branches do not lie in numbered blocks of one container.
    """
    paths = [name.split(".") for name in branches]
    common = 0
    while all(len(p) > common + 1 for p in paths) and len({p[common] for p in paths}) == 1:
        common += 1
    for numbered in (str.isdigit, _ends_in_a_number):
        for i in range(common, -1, -1):
            # A module that is numbered among others (dropout1, dropout2) holds branches, or it is not a
            # block; in a list or a Sequential, it may be block and branch in one.
            inside = numbered is str.isdigit or all(len(p) > i + 1 for p in paths)
            if inside and all(numbered(p[i]) for p in paths):
                return {name: ".".join(p[: i + 1]) for name, p in zip(branches, paths, strict=True)}
    raise MeasureError(
        f"The branches {', '.join(branches[:3])}{', ...' if len(branches) > 3 else ''} do not lie in "
        "numbered blocks of one container (blocks.0, blocks.1, ...), so that the first block, whose "
        "input is h_0, cannot be told. Put the blocks into an nn.ModuleList or an nn.Sequential."
    )


def _ends_in_a_number(part: str) -> bool:
    return part[-1:].isdigit()
