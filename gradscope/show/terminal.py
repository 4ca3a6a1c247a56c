"""The terminal table: one line per layer, readable at 80 columns and without colour."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from gradscope.analysis.trunk import OK, WITHOUT_GRADIENT, Trunk
from gradscope.errors import QuantityError
from gradscope.record import Record, Step

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["layer_table", "render"]

#: A terminal at least this wide gets the bar column.
_WIDE: Final = 100
#: Class names are cut to this length, in a narrow and in a wide table.
_TYPE: Final = 9
_TYPE_WIDE: Final = 24
#: Layer names longer than this are broken at their dots.
_NAME: Final = 16
#: Half a bar stands for the last layer's flow; a character more or less is this many nats.
_BAR: Final = 16
_NATS_PER_CHARACTER: Final = 2.0

_Key = tuple[str, float, str, int]  # trunk, depth, layer, call


@dataclass(frozen=True, slots=True)
class _Cell:
    """One number over replicates: the values that are there and the reasons of those that are not."""

    values: npt.NDArray[np.float64]
    reasons: tuple[str, ...]

    @property
    def missing(self) -> bool:
        return not len(self.values)

    def text(self, combined: Callable[[npt.NDArray[np.float64]], float]) -> str:
        return "-" if self.missing else _number(combined(self.values))


_NOTHING: Final = _Cell(np.empty(0), ())


def layer_table(record: Record, step: int | None = None, *, wide: bool = False) -> Table:
    """A table with one line per stream position and branch, by trunk and depth.

    Columns: depth, layer (without the trunk's name), type, gradient flow, its ratio to the trunk's
    last position, activation variance, largest absolute activation, number of NaN and infinite elements
    (activation and gradient), norm of the module's parameter gradients, and why values are absent.
    Several replicates are shown as geometric mean (flow, variance, parameters), maximum and sum.
    Without a trunk, every watched layer has a line.

    Args:
        record: the Record.
        step: the step's number; None: the last that has gradients. The caption says which, and
            from which earlier step the variance comes, where it was not sampled at this one.
        wide: also draw the ratio as a bar, for 100 columns and more: eight characters are a ratio of
            1, each further one is 2 nats.

    Raises:
        QuantityError: the Record has no steps, or not that one.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    steps, number = _chosen(record, step)
    lines = _collect(record, steps)
    variance_from = _fill_variance(record, number, lines)
    denominator = record.header.get("loss_denominator")
    trunks = tuple(dict.fromkeys(line.key[0] for line in lines))
    title = f"{record.header.get('model', 'model')}, step {number}"
    if len(trunks) == 1 and trunks[0]:
        title = f"{title}, trunk {trunks[0]}"
    table = Table(
        box=_ascii(SIMPLE_HEAD),
        show_edge=False,
        padding=0,
        title=Text(title),
        title_justify="left",
        caption=_caption(steps, number, variance_from, denominator is None),
        caption_justify="left",
        title_style="bold",
        caption_style="",
    )
    type_width = max([4, *(min(len(line.type), _TYPE_WIDE if wide else _TYPE) for line in lines)])
    table.add_column("depth", justify="right", width=5)
    table.add_column("layer", overflow="fold", min_width=6)
    table.add_column("type", width=type_width)
    for name in ("grad\nflow", "over\nlast", "act\nvar", "max\n|x|"):
        table.add_column(name, justify="right", width=7)
    table.add_column("nan,\ninf", justify="right", width=4)
    table.add_column("param\ngrad", justify="right", width=7)
    if wide:
        table.add_column("over last:\n| is 1, # 2 nats", width=_BAR + 1)
    table.add_column("status", overflow="fold", min_width=6)
    for trunk in trunks:
        group = [line for line in lines if line.key[0] == trunk]
        last = _last_flow(group, denominator)
        if len(trunks) > 1:
            table.add_row("", Text(trunk, style="bold"))
        for line in group:
            trouble, cells = _row(line, denominator, last, wide)
            cells[2] = _clip(cells[2], type_width)
            style = {"broken": "bold red", "zero": "yellow", "absent": "dim"}.get(trouble, "")
            table.add_row(*(Text(cell) for cell in cells), style=style)
    return table


def render(record: Record, width: int | None = None, step: int | None = None) -> str:
    """`layer_table` as plain text, without colour.

    Args:
        record: the Record.
        width: columns; None: that of the terminal, or 80 where there is none. From 100 on, with bars.
        step: as for `layer_table`.
    """
    import shutil

    from rich.console import Console

    width = width if width is not None else shutil.get_terminal_size((80, 24)).columns
    out = StringIO()
    console = Console(file=out, width=width, color_system=None, force_terminal=False, highlight=False)
    console.print(layer_table(record, step, wide=width >= _WIDE))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


# -- reading -------------------------------------------------------------------------------


@dataclass(slots=True)
class _Line:
    key: _Key
    type: str
    on_stream: bool
    cells: dict[tuple[str, str], _Cell]
    parameters: _Cell = _NOTHING

    def cell(self, signal: str, statistic: str) -> _Cell:
        return self.cells.get((signal, statistic), _NOTHING)


def _chosen(record: Record, step: int | None) -> tuple[list[Step], int]:
    if not record.steps:
        raise QuantityError(
            "the Record holds no step. A step is complete when the next one begins, when the scope is "
            "closed, or when scope.step() is called."
        )
    numbers = sorted({s.step for s in record.steps})
    if step is None:
        with_gradient = [s.step for s in record.steps if _has_gradient(s)]
        step = max(with_gradient, default=numbers[-1])
    elif step not in numbers:
        raise QuantityError(
            f"no step {step} in this Record; it holds {len(numbers)} steps from {numbers[0]} to "
            f"{numbers[-1]}."
        )
    return [s for s in record.steps if s.step == step], step


def _has_gradient(step: Step) -> bool:
    return any(
        status == 0 and signal == "output_grad"
        for signal, status in zip(step.rows.signal, step.status.tolist(), strict=True)
    )


def _collect(record: Record, steps: Sequence[Step]) -> list[_Line]:
    """One line per module call on an axis; without any axis, one per module call."""
    values: dict[tuple[_Key, str, str], list[tuple[float, str]]] = {}
    types: dict[_Key, str] = {}
    parameters: dict[str, list[tuple[float, str]]] = {}
    on_axis = bool(record.trunks)
    for step in steps:
        words = step.words()
        for i, (trunk, depth, layer, kind, call, signal, statistic) in enumerate(step.rows.entries()):
            entry = (float(step.value[i]), str(words[i]))
            if kind == "Parameter":
                if (signal, statistic) == ("param_grad", "l2"):
                    parameters.setdefault(layer, []).append(entry)
            elif trunk or not on_axis:
                key = (trunk, -1.0 if depth != depth else depth, layer, call)
                types.setdefault(key, kind)
                values.setdefault((key, signal, statistic), []).append(entry)
    axis = Record({}, tuple(steps))
    stream = {(trunk, *place) for trunk in axis.trunks for place in Trunk(axis, trunk).stream}
    lines = {key: _Line(key, kind, key in stream, {}) for key, kind in types.items()}
    for (key, signal, statistic), entries in values.items():
        lines[key].cells[signal, statistic] = _cell(entries)
    for line in lines.values():
        # Tied and repeated modules: the gradient is summed over uses, so it stands at the first.
        if line.key[3] == 0 and line.type != "Stream":
            line.parameters = _parameter_norm(line.key[2], parameters)
    order = {trunk: i for i, trunk in enumerate(record.trunks)}
    # A block's output has the depth of its last branch and comes after it.
    return sorted(lines.values(), key=lambda n: (order.get(n.key[0], -1), n.key[1], n.on_stream))


def _cell(entries: Sequence[tuple[float, str]]) -> _Cell:
    return _Cell(
        np.asarray([value for value, why in entries if why == OK], dtype=np.float64),
        tuple(dict.fromkeys(why for _, why in entries if why != OK)),
    )


def _parameter_norm(layer: str, parameters: dict[str, list[tuple[float, str]]]) -> _Cell:
    """Norm over the module's parameters per replicate, those without a gradient by design left out."""
    inside = [v for name, v in parameters.items() if not layer or name.startswith(f"{layer}.")]
    if not inside:
        return _NOTHING
    totals: list[tuple[float, str]] = []
    for entries in zip(*inside, strict=False):
        there = [value for value, why in entries if why == OK]
        missing = next((e for e in entries if e[1] != OK and e[1] not in WITHOUT_GRADIENT), None)
        totals.append(missing or ((math.hypot(*there), OK) if there else entries[0]))
    return _cell(totals)


def _fill_variance(record: Record, number: int, lines: Sequence[_Line]) -> int | None:
    """Where act_var was not sampled at this step, take it from the last step before that has it."""
    key = ("activation", "token_variance")
    cells = [line.cell(*key) for line in lines]
    if any(not cell.missing for cell in cells) or not any("not sampled" in c.reasons for c in cells):
        return None
    for earlier in sorted({s.step for s in record.steps if s.step < number}, reverse=True):
        found = {n.key: n for n in _collect(record, [s for s in record.steps if s.step == earlier])}
        if any(not n.cell(*key).missing for n in found.values()):
            for line in lines:
                if line.key in found:
                    line.cells[key] = found[line.key].cell(*key)
            return earlier
    return None


# -- writing -------------------------------------------------------------------------------


def _flow(line: _Line, denominator: float | None) -> _Cell:
    l2, tokens = line.cell("output_grad", "l2"), line.cell("output_grad", "tokens")
    if l2.missing or len(l2.values) != len(tokens.values):
        return _Cell(np.empty(0), l2.reasons or tokens.reasons)
    factor = 1.0 if denominator is None else float(denominator)
    with np.errstate(all="ignore"):
        return _Cell(factor * l2.values / np.sqrt(tokens.values), l2.reasons)


def _last_flow(lines: Sequence[_Line], denominator: float | None) -> float:
    for line in reversed(lines):
        if line.on_stream and line.key[1] >= 0:
            flow = _flow(line, denominator)
            return math.nan if flow.missing else _geometric(flow.values)
    return math.nan


def _row(line: _Line, denominator: float | None, last: float, wide: bool) -> tuple[str, list[str]]:
    trunk, depth, layer, call = line.key
    name = "input" if line.type == "Stream" else layer.removeprefix(f"{trunk}.") if trunk else layer
    indent = "" if line.on_stream or depth < 0 else "  "
    flow = _flow(line, denominator)
    mean = math.nan if flow.missing else _geometric(flow.values)
    ratio = mean / last if last and not math.isnan(last) else math.nan
    nonfinite = [line.cell(s, "nonfinite") for s in ("activation", "output_grad")]
    bad = sum(float(np.nansum(cell.values)) for cell in nonfinite)
    trouble = "broken" if bad or (not flow.missing and not math.isfinite(mean)) else ""
    zeros = int((flow.values == 0).sum())
    reasons = _reasons(line, flow)
    if trouble:
        reasons.insert(0, "not finite")
    if zeros:
        trouble = trouble or "zero"
        reasons.insert(
            0, "zero grad" if zeros == len(flow.values) else f"zero grad {zeros}/{len(flow.values)}"
        )
    if flow.missing and not trouble:
        trouble = "absent"
    cells = [
        "" if depth < 0 else f"{depth:.4g}",
        _at_dots(f"{indent}{name or '(model)'}{f' call {call}' if call else ''}", f"{indent}  "),
        line.type,
        flow.text(_geometric),
        "-" if math.isnan(ratio) else _number(ratio),
        line.cell("activation", "token_variance").text(_geometric),
        line.cell("activation", "absmax").text(np.max),
        "-" if all(cell.missing for cell in nonfinite) else f"{bad:.0f}",
        line.parameters.text(_geometric),
    ]
    if wide:
        cells.append(_bar(ratio))
    return trouble, [*cells, "; ".join(reasons)]


def _reasons(line: _Line, flow: _Cell) -> list[str]:
    """Why the line's own values are absent, in short; not what a cadence leaves out by design."""
    found = [*flow.reasons]
    for cell in (line.cell("activation", "absmax"), line.parameters):
        found.extend(cell.reasons)
    return [_short(why) for why in dict.fromkeys(found) if why != "not sampled"]


def _short(why: str) -> str:
    why = re.sub(r"\s+", " ", why)
    return _clip(why, 28)


def _clip(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 2]}.."


def _at_dots(name: str, indent: str) -> str:
    """A long name broken before a dot, where a reader would break it."""
    lines = [""]
    for part in re.split(r"(?=\.)", name):
        if lines[-1].strip() and len(lines[-1]) + len(part) > _NAME:
            lines.append(indent)
        lines[-1] += part
    return "\n".join(lines)


def _geometric(values: npt.NDArray[np.float64]) -> float:
    """Geometric mean of norms; 0 where any is 0, NaN where any is NaN."""
    if np.isnan(values).any():
        return math.nan
    with np.errstate(all="ignore"):
        return float(values[0]) if len(values) == 1 else float(np.exp(np.log(values).mean()))


def _number(x: float) -> str:
    """Three significant digits in at most seven characters: 0.0123, 12.3, 1.2e-17, nan."""
    if x == 0 or not math.isfinite(x):
        return "0" if x == 0 else str(x)
    if 1e-3 <= abs(x) < 1e4:
        return f"{x:.3g}" if abs(x) < 1000 else f"{x:.0f}"
    mantissa, exponent = f"{x:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _bar(ratio: float) -> str:
    """Half a bar at ratio 1, one character per 2 nats; '<' and '>' where it leaves the scale."""
    if math.isnan(ratio):
        return ""
    if ratio == 0:
        return "0"
    half = _BAR // 2
    length = half + (round(math.log(ratio) / _NATS_PER_CHARACTER) if math.isfinite(ratio) else _BAR)
    bar = "#" * min(max(length, 0), _BAR)
    bar = f"{bar:<{_BAR}}"
    bar = f"{bar[:half]}|{bar[half:]}"
    return f"<{bar[1:]}" if length <= 0 else f"{bar[:-1]}>" if length > _BAR else bar


def _caption(steps: Sequence[Step], number: int, variance_from: int | None, relative: bool) -> str:
    notes: list[str] = []
    if len(steps) > 1:
        notes.append(
            f"{len(steps)} replicates: geometric means, max |x| the largest, non-finite the sum."
        )
    losses = [s.loss for s in steps if s.loss is not None]
    if losses:
        notes.append(f"Loss {_number(float(np.mean(losses)))}.")
    if variance_from is not None:
        notes.append(f"act var is from step {variance_from}, the last before step {number} that has it.")
    if relative:
        notes.append("grad flow is known up to one factor per step (loss denominator unknown).")
    return " ".join(notes)


def _ascii(box: Any) -> Any:
    """The same box of ASCII characters: a log file or a C locale must be able to print it."""
    from rich.box import Box

    return Box(
        "\n".join(re.sub(r"[^\x00-\x7f]", "-", line) for line in str(box).splitlines()), ascii=True
    )
