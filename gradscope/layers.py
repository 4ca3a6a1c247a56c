"""What is watched: layers by name, and the depth axis found in an unmodified model.

A *trunk* is a container of repeated blocks (``transformer.h``, ``model.layers``, a plain
``nn.Sequential``); its *blocks* are read in the order in which they run; a block's *branches* are
the sublayers whose outputs are added to the stream. `find_trunks` proposes them from the module
tree; the autograd graph of the first recorded forward decides which branches really are added
(`gradscope.collect.graph`), and the others stay off the axis.

Names are those of ``named_modules()`` without wrapper prefixes, which are stripped only where
the owner *is* such a wrapper: a user's own attribute called ``module`` survives.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from torch import nn

from gradscope.errors import LayerError

__all__ = ["Layer", "Selection", "Trunk", "find_branches", "find_trunks", "named_layers", "select"]

#: What ``layers=`` accepts: a glob over names (``*`` is one name part, ``**`` any number), a module
#: class, a predicate (name, module) -> bool, or several of them.
Selection = (
    str
    | type[nn.Module]
    | Callable[[str, nn.Module], bool]
    | Sequence[str | type[nn.Module] | Callable[[str, nn.Module], bool]]
)

# The child that is transparent in a wrapper, by the wrapper's class name (no import needed).
_WRAPPERS: Final = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "OptimizedModule": "_orig_mod",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "PeftModel": "base_model",
    "BaseTuner": "model",
}
_CONTAINERS: Final = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_ATTENTION: Final = re.compile(r"att(ention|n)|mixer|mamba|ssm|retention|rwkv|multihead", re.IGNORECASE)
_FEED_FORWARD: Final = re.compile(
    r"mlp|ffn|ffw|feed_?forward|^ff(_|\d|$)|^fc(_|$)|experts?$|moe", re.IGNORECASE
)
_NORM: Final = re.compile(r"norm|^ln(_|\d|$)|^bn\d*$", re.IGNORECASE)
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

#: Where the residual branch ends inside a layer class whose module tree does not say so: the
#: outputs of these children are what the class adds to the stream.
_KNOWN_BRANCHES: Final = {
    "TransformerEncoderLayer": ("dropout1", "dropout2"),
    "TransformerDecoderLayer": ("dropout1", "dropout2", "dropout3"),
}
#: Layer classes, by the beginning of their names, that compute [tokens, batch, features] unasked.
_TOKENS_FIRST: Final = ("XLNetLayer", "XLNetRelativeAttention", "XLNetFeedForward")
#: Children that end a branch inside an attention or feed-forward module that itself adds (and
#: normalises): the first that exists is proposed.
_BRANCH_ENDS: Final = ("branch", "output.dropout", "output.dense")


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

    def same_block(self, other: Layer) -> bool:
        """Whether both belong to the same block of the same trunk."""
        return (self.trunk, self.block) == (other.trunk, other.block)

    def feature_axis(self, axes: int) -> int:
        """The axis of features in an output of so many axes."""
        return 1 if axes in self.channels_first else -1

    @property
    def is_block(self) -> bool:
        """Whether its output is a position of the residual stream."""
        return self.block is not None and self.branch is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trunk:
    """A container of repeated blocks.

    Attributes:
        name: its name; for numbered attributes (``block1``, ``block2``) their common part; the
            class name where the model itself is the container.
        blocks: the blocks' names in container order.
        branches: for each block, the names of its proposed branches.
        parts: for each block, the modules that it consists of where it is the last of several.
    """

    name: str
    blocks: tuple[str, ...]
    branches: tuple[tuple[str, ...], ...]
    parts: tuple[tuple[str, ...], ...] = ()


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by clean name, the model itself under "", each module once, in definition order."""
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()

    def walk(module: nn.Module, name: str) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        transparent = _transparent_child(module)
        if transparent is None or name not in found:
            # A wrapper and its content share a name; the content is what the user knows.
            found[name] = module
        for child_name, child in module._modules.items():
            if child is None:
                continue
            if child_name == transparent:
                found.pop(name, None)
                walk(child, name)
            else:
                walk(child, f"{name}.{child_name}" if name else child_name)

    walk(model, "")
    return found


def _transparent_child(module: nn.Module) -> str | None:
    for cls in type(module).__mro__:
        child = _WRAPPERS.get(cls.__name__)
        if child is not None and child in module._modules:
            return child
    return None


def callable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """`named_layers` without the containers that are never called."""
    return {
        name: module
        for name, module in named_layers(model).items()
        if not (
            isinstance(module, _CONTAINERS)
            and type(module).forward in (nn.Module.forward, *(c.forward for c in _CONTAINERS))
        )
    }


# -- the depth axis ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Candidate:
    name: str
    blocks: tuple[str, ...]
    attention: bool
    leaves: bool
    parameters: int
    block_type: str
    parts: tuple[tuple[str, ...], ...] = ()


def find_trunks(model: nn.Module) -> tuple[Trunk, ...]:
    """The trunks of a model, proposed from its module tree; () when there is none.

    Repeated containers are preferred in this order: lists of blocks that hold attention (all of
    them: an encoder and a decoder are two trunks), other lists of blocks of the class that holds
    the most parameters (staged nets have several), and at last a plain stack of weight layers,
    where a block is a weight layer with the norms and activations that follow it and is read at
    the last of them. A list inside a block is not a trunk, except where the outer list is one of
    stages.
    """
    layers = named_layers(model)
    candidates = _without_nested(list(_block_lists(layers)), layers)
    if not candidates:
        # One block that is called again and again (ALBERT): depth is counted in calls.
        candidates = [c for c in _block_lists(layers, least=1) if c.attention]
        candidates = candidates[-1:]  # the innermost list: definition order puts it last
    if any(c.attention for c in candidates):
        candidates = [c for c in candidates if c.attention]
    elif candidates:
        best = max(candidates, key=lambda c: c.parameters)
        candidates = [c for c in candidates if c.block_type == best.block_type]
    else:
        stacks = list(_stacks(layers))
        candidates = [max(stacks, key=lambda c: (len(c.blocks), c.parameters))] if stacks else []
    return tuple(
        Trunk(
            name=c.name or type(model).__name__,
            blocks=c.blocks,
            branches=tuple(() if c.leaves else _names(b, find_branches(layers[b])) for b in c.blocks),
            parts=c.parts,
        )
        for c in candidates
    )


def _names(prefix: str, names: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{prefix}.{n}" if prefix else n for n in names)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _children(layers: dict[str, nn.Module], name: str) -> dict[str, nn.Module]:
    # Through the clean names, so that a wrapped child is seen as its content.
    module = layers[name]
    found = {}
    for child in module._modules:
        content = layers.get(_join(name, child))
        if content is not None:
            found[child] = content
    return found


def _weight_modules(module: nn.Module) -> int:
    return sum(any(True for _ in m.parameters(recurse=False)) for m in module.modules())


def _is_block(module: nn.Module) -> bool:
    own = any(True for _ in module.parameters(recurse=False))
    return (
        not isinstance(module, _CONTAINERS)
        and _weight_modules(module) - own >= 1
        and bool(module._modules)
    )


def _has_attention(module: nn.Module) -> bool:
    return any(
        _ATTENTION.search(type(m).__name__) or _ATTENTION.search(n.rpartition(".")[2])
        for n, m in module.named_modules()
        if n
    )


def _block_lists(layers: dict[str, nn.Module], least: int = 2) -> Iterator[_Candidate]:
    for name in layers:
        children = _children(layers, name)
        numbered = {n: m for n, m in children.items() if n.isdigit()}
        groups: dict[str, dict[str, nn.Module]] = {}
        # A block that several entries share (universal nets) is one module, called that often.
        shared = sum(n.isdigit() for n in layers[name]._modules) >= 2 > len(numbered) > 0
        if len(numbered) >= least or shared:
            groups[name] = numbered
        else:
            for n, m in children.items():
                stem = re.fullmatch(r"(.*?\D)_?\d+", n)
                if stem:
                    groups.setdefault(_join(name, stem[1].rstrip("_")), {})[n] = m
        for trunk, members in groups.items():
            blocks = {n: m for n, m in members.items() if _is_block(m)}
            if isinstance(layers[name], nn.Sequential) or trunk != name:
                # A Sequential may hold an embedding and a head beside the blocks: the commonest class.
                common = Counter(type(m) for m in blocks.values()).most_common(1)
                blocks = {n: m for n, m in blocks.items() if type(m) is common[0][0]}
            elif len(blocks) < len(members):
                continue
            elif len({type(m) for m in blocks.values()}) > 1 and not all(
                _has_attention(m) for m in blocks.values()
            ):
                # T5's inner list [self-attention, feed-forward] is one block, not a stack of two.
                continue
            if len(blocks) < (1 if shared else least):
                continue
            yield _Candidate(
                name=trunk,
                blocks=_names(name, blocks),
                attention=all(_has_attention(m) for m in blocks.values()),
                leaves=False,
                parameters=sum(p.numel() for m in blocks.values() for p in m.parameters()),
                block_type=type(next(iter(blocks.values()))).__name__,
            )


def _inside(inner: str, outer: str) -> bool:
    return inner != outer and (not outer or inner.startswith(outer + "."))


def _without_nested(candidates: list[_Candidate], layers: dict[str, nn.Module]) -> list[_Candidate]:
    kept = list(candidates)
    for outer in candidates:
        if outer not in kept:
            continue
        inner = [c for c in kept if c is not outer and any(_inside(c.blocks[0], b) for b in outer.blocks)]
        # Stages: every outer "block" is little more than a list of whole blocks, norms included.
        stages = [
            c
            for c in inner
            if any(
                _NORM.search(n.rpartition(".")[2]) for n, _ in layers[c.blocks[0]].named_modules() if n
            )
            and sum(_is_weight_layer(m) for m in layers[c.blocks[0]].modules() if not m._modules) >= 2
        ]
        if (
            2 * len(stages) > len(outer.blocks)
            and 2 * sum(c.parameters for c in stages) > outer.parameters
        ):
            kept = [c for c in kept if c is not outer]
        else:
            kept = [c for c in kept if c not in inner]
    return kept


def _stacks(layers: dict[str, nn.Module]) -> Iterator[_Candidate]:
    for name, module in layers.items():
        children = _children(layers, name)
        groups: list[tuple[str, list[list[str]]]] = []
        if isinstance(module, nn.Sequential | nn.ModuleList):
            members = list(children)
            starts = [i for i, m in enumerate(children.values()) if _is_weight_layer(m)]
            ends = [*starts[1:], len(members)]
            if isinstance(module, nn.ModuleList):
                ends = [i + 1 for i in starts]
            groups.append(
                (name, [members[a:b] for a, b in zip(starts, ends, strict=True)] if starts else [])
            )
        else:
            stems: dict[str, list[str]] = {}
            for n, m in children.items():
                stem = re.fullmatch(r"(.*?\D)_?\d+", n)
                if stem and _is_weight_layer(m):
                    stems.setdefault(stem[1].rstrip("_"), []).append(n)
            groups.extend((_join(name, stem), [[n] for n in names]) for stem, names in stems.items())
        for trunk, blocks in groups:
            if len(blocks) >= 2:
                yield _Candidate(
                    name=trunk,
                    blocks=_names(name, [block[-1] for block in blocks]),
                    parts=tuple(_names(name, block) for block in blocks),
                    attention=False,
                    leaves=True,
                    parameters=sum(p.numel() for p in module.parameters()),
                    block_type="",
                )


def _is_weight_layer(module: nn.Module) -> bool:
    return not isinstance(module, nn.Embedding | nn.EmbeddingBag) and any(
        p.dim() >= 2 for p in module.parameters()
    )


def find_branches(block: nn.Module) -> tuple[str, ...]:
    """Names, relative to the block, of the modules whose outputs seem to be its residual branches.

    A proposal from class and attribute names; whether an output really is added to the stream is
    decided on the autograd graph of the first recorded forward.
    """
    for cls in type(block).__mro__:
        known = _KNOWN_BRANCHES.get(cls.__name__)
        if known is not None and all(n in block._modules for n in known):
            return known
    children = {
        n: m for n, m in block._modules.items() if m is not None and not isinstance(m, _CONTAINERS)
    }
    found: list[str] = []
    attention = [
        n
        for n, m in children.items()
        if (_ATTENTION.search(n) or _ATTENTION.search(type(m).__name__))
        and not _NORM.search(n)
        and "Dropout" not in type(m).__name__
        and any(True for _ in m.parameters())
    ]
    feed_forward = [
        n
        for n, m in children.items()
        if n not in attention
        and not _NORM.search(n)
        and (_FEED_FORWARD.search(n) or _FEED_FORWARD.search(type(m).__name__))
        and m._modules
    ]
    for n in attention + feed_forward:
        end = next((e for e in _BRANCH_ENDS if _get(children[n], e) is not None), None)
        found.append(f"{n}.{end}" if end else n)
    if attention and not feed_forward:
        # BERT keeps the last linear in ``output``; a classic layer has bare linears of its own.
        output = children.get("output")
        end = next((e for e in ("dropout", "dense") if output is not None and _get(output, e)), None)
        linears = [n for n, m in children.items() if isinstance(m, nn.Linear)]
        if end:
            found.append(f"output.{end}")
        elif linears:
            found.append(linears[-1])
    return tuple(found)


def _get(module: nn.Module, path: str) -> nn.Module | None:
    for part in path.split("."):
        child = module._modules.get(part)
        if child is None:
            return None
        module = child
    return module


# -- selection -----------------------------------------------------------------------------


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
                f"No trunk found in {type(model).__name__}: none of its {len(modules)} modules is a "
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
                type=type(module).__name__,
                trunk=trunk,
                block=block,
                branch=branch,
                channels_first=_channels_first(name, everything),
                token_axis=_token_axis(name, everything),
                parts=parts[trunk][block] if trunk in parts and block is not None else (),
            )
            found.append((layer, module))
    return tuple(found)


def _around(name: str, modules: dict[str, nn.Module]) -> Iterator[nn.Module]:
    """The module of this name and those that hold it, from the inside out."""
    while True:
        if name in modules:
            yield modules[name]
        if not name:
            return
        name = name.rpartition(".")[0]


def _channels_first(name: str, modules: dict[str, nn.Module]) -> tuple[int, ...]:
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


def _token_axis(name: str, modules: dict[str, nn.Module]) -> int:
    """0 in and directly around an attention with ``batch_first=False``, else 1."""
    if type(modules[name]).__name__.startswith(_TOKENS_FIRST):
        return 0
    inside = (m for m in modules[name].modules() if isinstance(m, nn.MultiheadAttention))
    beside = (
        m for p in _around(name, modules) for m in p.children() if isinstance(m, nn.MultiheadAttention)
    )
    attention = next(inside, None) or next(beside, None)
    return 1 if attention is None or attention.batch_first else 0


def _matching(modules: dict[str, nn.Module], layers: Selection, trunks: tuple[Trunk, ...]) -> set[str]:
    patterns = list(layers) if isinstance(layers, Sequence) and not isinstance(layers, str) else [layers]
    chosen: set[str] = set()
    for pattern in patterns:
        if isinstance(pattern, str):
            glob = _glob(pattern)
            matched = {n for n in modules if glob.fullmatch(n)}
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


def _glob(pattern: str) -> re.Pattern[str]:
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
