"""What `gradscope.doctor` found: plain data that prints itself as a table."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Check", "DoctorReport", "SignalCheck", "WrongValue"]

#: So many wrong values are written out.
_SHOWN = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class WrongValue:
    """A recorded value that autograd on the unwatched copy contradicts.

    Attributes:
        layer: the module or parameter.
        call: which call of it, from 0.
        signal: such as ``output_grad``.
        statistic: such as ``l2``.
        recorded: the value in the Record, or None where it was absent.
        expected: the copy's value, or None where it has none.
        why: what is wrong in words.
    """

    layer: str
    call: int
    signal: str
    statistic: str
    recorded: float | None
    expected: float | None
    why: str

    def __str__(self) -> str:
        call = f" (call {self.call})" if self.call else ""
        return f"{self.layer}{call}, {self.statistic} of the {self.signal}: {self.why}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalCheck:
    """The values of one signal and statistic, over all layers and calls.

    Attributes:
        signal: such as ``output_grad``.
        statistic: such as ``l2``.
        right: values that agree with the copy's.
        wrong: values that do not.
        absent: by status, how many are absent.
        unchecked: values that the copy has no counterpart for.
        largest_error: the largest relative difference among the right ones.
    """

    signal: str
    statistic: str
    right: int
    wrong: int
    absent: dict[str, int]
    unchecked: int
    largest_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was tried.

    Attributes:
        name: what was tried.
        ok: True or False; None where it is for information, or could not be judged.
        detail: what was seen.
    """

    name: str
    ok: bool | None
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorReport:
    """Whether gradscope can be trusted on this model, batch and machine.

    Attributes:
        model: the model's class.
        signals: the values, by signal and statistic.
        wrong: every wrong value.
        checks: everything else that was tried.
        refused: why the model cannot be watched at all; "" where it can.
    """

    model: str
    signals: tuple[SignalCheck, ...] = ()
    wrong: tuple[WrongValue, ...] = ()
    checks: tuple[Check, ...] = ()
    refused: str = ""

    @property
    def ok(self) -> bool:
        """Nothing was wrong, and nothing was refused."""
        return not (self.refused or self.wrong or any(check.ok is False for check in self.checks))

    @property
    def right(self) -> int:
        """How many values agree with the copy's."""
        return sum(signal.right for signal in self.signals)

    def __str__(self) -> str:
        if self.refused:
            return f"gradscope doctor: {self.model}: refused\n{self.refused}"
        absent = sum(sum(signal.absent.values()) for signal in self.signals)
        said = f"{self.right} values right, {len(self.wrong)} wrong, {absent} absent with a reason"
        lines = [f"gradscope doctor: {self.model}: {'fine' if self.ok else 'NOT FINE'} ({said})", ""]
        rows = [("signal", "statistic", "right", "wrong", "largest error", "absent")]
        for s in self.signals:
            reasons = [f"{n} {why}" for why, n in s.absent.items()]
            reasons += [f"{s.unchecked} not checked"] if s.unchecked else []
            error = f"{s.largest_error:.1e}" if s.right else "–"
            rows.append((s.signal, s.statistic, str(s.right), str(s.wrong), error, "; ".join(reasons)))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        for row in rows:
            left = f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}"
            numbers = "  ".join(f"{row[i]:>{widths[i]}}" for i in (2, 3, 4))
            lines.append(f"{left}  {numbers}  {row[5]}".rstrip())
        lines.append("")
        width = max((len(check.name) for check in self.checks), default=0)
        words = {True: "right", False: "WRONG", None: "–"}
        lines += [f"{c.name:<{width}}  {words[c.ok]:<5}  {c.detail}" for c in self.checks]
        if self.wrong:
            lines += ["", "Wrong values:"]
            lines += [f"  {wrong}" for wrong in self.wrong[:_SHOWN]]
            rest = len(self.wrong) - _SHOWN
            lines += [f"  and {rest} more"] if rest > 0 else []
        return "\n".join(lines)
