"""Branches that the caller names by the modules whose outputs they are, and the blocks around them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from gradscope.errors import LayerError, MeasureError
from gradscope.layers import Trunk, select

__all__ = ["NamedTrunk", "named_trunk"]

#: A trunk of which the caller says it, and the names of its branches in definition order.
NamedTrunk = tuple[Trunk, tuple[str, ...]]


def named_trunk(model: nn.Module, modules: str | Sequence[str] | None) -> NamedTrunk | None:
    """The trunk whose branches are the outputs of these modules; None where none are named.

    Args:
        model: the model.
        modules: names or globs.

    Raises:
        MeasureError: one lies inside another, or they lie in no numbered blocks.
        LayerError: a pattern matches no module.
    """
    if modules is None:
        return None
    patterns = [modules] if isinstance(modules, str) else list(modules)
    if not patterns:
        raise MeasureError(
            'modules= is empty. Name them: modules=["blocks.*.attention"]; without it they are found.'
        )
    try:
        # The model itself, which has no name, matches "*" but is no branch of itself.
        names = tuple(layer.name for layer, _ in select(model, patterns) if layer.name)
    except LayerError as error:
        raise LayerError(str(error).replace("layers=", "modules=", 1)) from None
    if not names:
        raise LayerError(f"modules={modules!r} matches the model itself alone: name modules inside it.")
    for outer in names:
        inner = next((name for name in names if name.startswith(f"{outer}.")), None)
        if inner is not None:
            raise MeasureError(
                f"The branch {inner} lies inside the branch {outer}: its "
                "paths would be counted twice. Name one of the two."
            )
    holder = _block_of_each(names)
    blocks = tuple(dict.fromkeys(holder.values()))
    return (
        Trunk(
            name=blocks[0].rpartition(".")[0] or type(model).__name__,
            blocks=blocks,
            branches=tuple(tuple(n for n in names if holder[n] == block) for block in blocks),
        ),
        names,
    )


def _block_of_each(branches: tuple[str, ...]) -> dict[str, str]:
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
