"""Which layers are watched, and where each is on the depth axis."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from gradscope.errors import LayerError
from gradscope.layers.naming import callable_layers, class_name, named_layers
from gradscope.layers.tensor_axes import channels_first, token_axis
from gradscope.layers.trunks import Trunk, find_trunks, parallel_lists

__all__ = ["Layer", "Selection", "glob", "select"]

#: What ``layers=`` accepts: a glob over names (``*`` is one name part, ``**`` any number), a module
#: class, a predicate (name, module) -> bool, or several of them.
Selection = (
    str
    | type[nn.Module]
    | Callable[[str, nn.Module], bool]
    | Sequence[str | type[nn.Module] | Callable[[str, nn.Module], bool]]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One watched module and its place on the depth axis.

    Attributes:
        name: its name, wrapper prefixes stripped.
        type: its class name.
        trunk: the name of its trunk, "" off the axis.
        block: the index of its block in the trunk, None off the axis.
        branch: its index among the block's proposed branches, None for the block itself.
        channels_first: the numbers of axes with which its output has its features on axis 1, as
            convolutions do; with any other number they are on the last.
        token_axis: the axis of tokens in a [batch, tokens, features] output: 1, or 0 where the
            module's attention says ``batch_first=False``.
        parts: where a block has no module of its own (a weight layer of a plain stack with the norms
            and activations behind it): the names of its modules, of which it is the last.
    """

    name: str
    type: str
    trunk: str = ""
    block: int | None = None
    branch: int | None = None
    channels_first: tuple[int, ...] = ()
    token_axis: int = 1
    parts: tuple[str, ...] = ()

    def feature_axis(self, axes: int) -> int:
        """The axis of features in an output of so many axes."""
        return 1 if axes in self.channels_first else -1

    @property
    def is_block(self) -> bool:
        """Whether its output is a position of the residual stream."""
        return self.block is not None and self.branch is None


def select(model: nn.Module, layers: Selection | None) -> tuple[tuple[Layer, nn.Module], ...]:
    """The layers to watch, with their modules, in definition order.

    Args:
        model: the model.
        layers: None for every block and its branches on each trunk, or a selection (see `Selection`).
            A glob that matches siblings only (``model.layers.*``) makes them the blocks of the axis.

    Raises:
        LayerError: no trunk in the model, or a pattern that matches nothing.
    """
    modules = callable_layers(model)
    trunks = find_trunks(model)
    if layers is None:
        if not trunks:
            raise LayerError(
                _parts_only(model)
                or f"No trunk found in {type(model).__name__}: none of its {len(modules)} modules is a "
                "container of at least two repeated blocks, nor a stack of at least two weight layers. "
                'Name the blocks: gradscope.watch(model, layers="path.to.blocks.*"), or watch every '
                'module: layers="**".'
            )
        chosen = {n for t in trunks for n in (*t.blocks, *(b for bs in t.branches for b in bs))}
    else:
        chosen = _matching(modules, layers, trunks)
        siblings = {n.rpartition(".")[0] for n in chosen}
        blocks = tuple(n for n in modules if n in chosen)
        if (
            isinstance(layers, str)
            and layers not in ("*", "**")
            and len(siblings) == 1
            and len(chosen) >= 2
            and all(n.rpartition(".")[2].isdigit() for n in chosen)
        ):
            trunks = (
                Trunk(
                    name=siblings.pop() or type(model).__name__,
                    blocks=blocks,
                    branches=((),) * len(blocks),
                ),
            )
    place: dict[str, tuple[str, int, int | None]] = {}
    for trunk in trunks:
        for k, block in enumerate(trunk.blocks):
            place.setdefault(block, (trunk.name, k, None))
            for j, branch in enumerate(trunk.branches[k]):
                place.setdefault(branch, (trunk.name, k, j))
    parts = {t.name: t.parts for t in trunks if t.parts}
    everything = named_layers(model)
    found: list[tuple[Layer, nn.Module]] = []
    for name, module in modules.items():
        if name in chosen:
            trunk, block, branch = place.get(name, ("", None, None))
            layer = Layer(
                name=name,
                type=class_name(module),
                trunk=trunk,
                block=block,
                branch=branch,
                channels_first=channels_first(name, everything),
                token_axis=token_axis(name, everything),
                parts=parts[trunk][block] if trunk in parts and block is not None else (),
            )
            found.append((layer, module))
    return tuple(found)


def _parts_only(model: nn.Module) -> str:
    lists = next(iter(parallel_lists(model)), ())
    if not lists:
        return ""
    return (
        f"No block of {type(model).__name__} is a module: the parts of its blocks stand in lists beside "
        f"each other ({', '.join(lists)}). Name the modules whose outputs are the stream, as the norms "
        f'that end the blocks: gradscope.watch(model, layers="{lists[-1]}.*"), or watch every module: '
        'layers="**".'
    )


def _matching(modules: dict[str, nn.Module], layers: Selection, trunks: tuple[Trunk, ...]) -> set[str]:
    patterns = list(layers) if isinstance(layers, Sequence) and not isinstance(layers, str) else [layers]
    chosen: set[str] = set()
    for pattern in patterns:
        if isinstance(pattern, str):
            regular = glob(pattern)
            matched = {n for n in modules if regular.fullmatch(n)}
        elif isinstance(pattern, type):
            matched = {n for n, m in modules.items() if isinstance(m, pattern)}
        elif callable(pattern):
            matched = {n for n, m in modules.items() if pattern(n, m)}
        else:
            raise LayerError(
                f"layers= takes globs over module names, module classes or predicates; got {pattern!r}."
            )
        if not matched:
            raise LayerError(_no_match(pattern, modules, trunks))
        chosen |= matched
    return chosen


def _no_match(pattern: object, modules: dict[str, nn.Module], trunks: tuple[Trunk, ...]) -> str:
    import difflib

    said = f"layers={pattern!r} matches none of the model's {len(modules)} modules."
    if isinstance(pattern, str):
        # Numbers say nothing about likeness: compare the shapes of the names.
        shapes = {re.sub(r"\.\d+(?=\.|$)", ".*", n): n for n in modules}
        near = difflib.get_close_matches(pattern, shapes, n=3, cutoff=0.4)
        blocks = [re.sub(r"(^|\.)\d+$", r"\1*", t.blocks[0]) for t in trunks]
        near = list(dict.fromkeys([*near, *blocks])) or sorted(shapes, key=len)[1:4]
        said += " Names look like " + ", ".join(repr(n) for n in near) + "."
    return said + ' "*" stands for one part of a name, "**" for any number of parts.'


def glob(pattern: str) -> re.Pattern[str]:
    """The regular expression of a glob over dotted names: ``*`` is one part, ``**`` any number."""
    out = ""
    for token in re.split(r"(\*\*\.?|\.\*\*$|\*|\?)", pattern):
        if token == "**.":
            out += r"(?:.*\.)?"
        elif token in ("**",):
            out += r".*"
        elif token == ".**":
            out += r"(?:\..*)?"
        elif token == "*":
            out += r"[^.]*"
        elif token == "?":
            out += r"[^.]"
        else:
            out += re.escape(token)
    return re.compile(out)
