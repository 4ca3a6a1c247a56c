"""The depth axis, found in an unmodified model.

A *trunk* is a container of repeated blocks (``transformer.h``, ``model.layers``, a plain
``nn.Sequential``); its *blocks* are read in the order in which they run; a block's *branches* are
the sublayers whose outputs are added to the stream. `find_trunks` proposes them from the module
tree; the autograd graph of the first recorded forward decides which branches really are added
(`gradscope.collect.graph`), and the others stay off the axis.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from torch import nn

from gradscope.layers.naming import CONTAINERS, class_name, named_layers

__all__ = ["Trunk", "find_branches", "find_trunks"]

_ATTENTION: Final = re.compile(r"att(ention|n)|mixer|mamba|ssm|retention|rwkv|multihead", re.IGNORECASE)
_FEED_FORWARD: Final = re.compile(
    r"mlp|ffn|ffw|feed_?forward|^ff(_|\d|$)|^fc(_|$)|experts?$|moe", re.IGNORECASE
)
_NORM: Final = re.compile(r"norm|^ln(_|\d|$)|^bn\d*$", re.IGNORECASE)

#: Where the residual branch ends inside a layer class whose module tree does not say so: the
#: outputs of these children are what the class adds to the stream.
_KNOWN_BRANCHES: Final = {
    "TransformerEncoderLayer": ("dropout1", "dropout2"),
    "TransformerDecoderLayer": ("dropout1", "dropout2", "dropout3"),
}
#: Children that end a branch inside an attention or feed-forward module that itself adds (and
#: normalises): the first that exists is proposed.
_BRANCH_ENDS: Final = ("branch", "output.dropout", "output.dense")


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


@dataclass(frozen=True, slots=True)
class _Candidate:
    name: str
    blocks: tuple[str, ...]
    attention: bool
    leaves: bool
    parameters: int
    weights: int
    block_type: str
    parts: tuple[tuple[str, ...], ...] = ()

    @property
    def size(self) -> int:
        """How much of a model it is. With attention by its layers, where a few wide ones weigh little."""
        return self.weights if self.attention else self.parameters


def find_trunks(model: nn.Module, *, parts: bool = False) -> tuple[Trunk, ...]:
    """The trunks of a model, proposed from its module tree; () when there is none.

    Repeated containers are preferred in this order: lists of blocks that hold attention (all of
    them: an encoder and a decoder are two trunks), other lists of blocks of the class that holds
    the most parameters (staged nets have several), and at last a plain stack of weight layers,
    where a block is a weight layer with the norms and activations that follow it and is read at
    the last of them. A list inside a block is not a trunk, except where the outer list is one of
    stages.

    Args:
        model: the model.
        parts: propose `parallel_lists` too, where what is proposed will be proved in the graph.
    """
    layers = named_layers(model)
    out = () if parts else tuple(f"{name}." for lists in parallel_lists(model) for name in lists)
    candidates = [c for c in _block_lists(layers) if not c.blocks[0].startswith(out)]
    candidates = _without_nested(candidates, layers)
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
        stacks = [c for c in _stacks(layers) if not c.blocks[0].startswith(out)]
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
    for child in module._modules.keys():  # of a scripted module, no dictionary
        content = layers.get(_join(name, child))
        if content is not None:
            found[child] = content
    return found


def _weight_modules(module: nn.Module) -> int:
    return sum(any(True for _ in m.parameters(recurse=False)) for m in module.modules())


def _is_block(module: nn.Module) -> bool:
    own = any(True for _ in module.parameters(recurse=False))
    return (
        not isinstance(module, CONTAINERS)
        and type(module) is not nn.Module  # a bare holder of others, which is never called
        and _weight_modules(module) - own >= 1
        and bool(module._modules)
    )


def _has_attention(module: nn.Module) -> bool:
    return any(_is_attention(n.rpartition(".")[2], m) for n, m in module.named_modules() if n)


def _is_attention(name: str, module: nn.Module) -> bool:
    # A table of position biases is called after the attention that it is for.
    return not isinstance(module, nn.Embedding) and bool(
        _ATTENTION.search(class_name(module)) or _ATTENTION.search(name)
    )


def parallel_lists(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Lists of equal length beside each other, of which one holds attentions and one feed-forwards.

    Such a model (XLM) has the parts of its blocks at one index of several lists, and no module that
    is a block. Where the stream is cannot be told from the tree: it depends on the order of the norms.
    """
    layers = named_layers(model)
    found: list[tuple[str, ...]] = []
    for name in layers:
        by_length: dict[int, list[str]] = {}
        for child, module in _children(layers, name).items():
            if isinstance(module, nn.ModuleList) and len(module) >= 2:
                by_length.setdefault(len(module), []).append(child)
        for names in by_length.values():
            first = {n: layers[_join(name, f"{n}.0")] for n in names if _join(name, f"{n}.0") in layers}
            attention = {n for n, m in first.items() if _is_attention(n, m)}
            feed_forward = {n for n, m in first.items() if _is_feed_forward(n, m)} - attention
            if attention and feed_forward:
                found.append(_names(name, names))
    return tuple(found)


def _is_feed_forward(name: str, module: nn.Module) -> bool:
    return bool(_FEED_FORWARD.search(name) or _FEED_FORWARD.search(class_name(module)))


def _block_lists(layers: dict[str, nn.Module], least: int = 2) -> Iterator[_Candidate]:
    for name in layers:
        children = _children(layers, name)
        numbered = {n: m for n, m in children.items() if n.isdigit()}
        groups: dict[str, dict[str, nn.Module]] = {}
        # A block that several entries share (universal nets) is one module, called that often.
        shared = sum(n.isdigit() for n in layers[name]._modules.keys()) >= 2 > len(numbered) > 0
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
            elif 1 < len({class_name(m) for m in blocks.values()}) == len(blocks) and not all(
                _has_attention(m) for m in blocks.values()
            ):
                # T5's inner list [self-attention, feed-forward] is one block, not a stack of two.
                continue
            if len(blocks) < (1 if shared else least):
                continue
            yield _Candidate(
                name=trunk,
                blocks=_names(name, blocks),
                attention=any(_has_attention(m) for m in blocks.values()),
                leaves=False,
                parameters=sum(p.numel() for m in blocks.values() for p in m.parameters()),
                weights=sum(_weight_modules(m) for m in blocks.values()),
                block_type=class_name(next(iter(blocks.values()))),
            )


def _inside(inner: str, outer: str) -> bool:
    return inner != outer and (not outer or inner.startswith(outer + "."))


def _without_nested(candidates: list[_Candidate], layers: dict[str, nn.Module]) -> list[_Candidate]:
    kept = list(candidates)
    for outer in candidates:
        if outer not in kept:
            continue
        inner = [c for c in kept if c is not outer and any(_inside(c.blocks[0], b) for b in outer.blocks)]
        # Stages: every outer "block" is little more than a list of whole blocks, norms included, and
        # attention where the outer ones have it (the two feed-forwards of a conformer are no stage).
        stages = [
            c
            for c in inner
            if c.attention >= outer.attention
            and any(
                _NORM.search(n.rpartition(".")[2]) for n, _ in layers[c.blocks[0]].named_modules() if n
            )
            and sum(_is_weight_layer(m) for m in layers[c.blocks[0]].modules() if not m._modules) >= 2
        ]
        if 2 * len(stages) > len(outer.blocks) and 2 * sum(c.size for c in stages) > outer.size:
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
                    weights=_weight_modules(module),
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
        n: m for n, m in block._modules.items() if m is not None and not isinstance(m, CONTAINERS)
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
