"""The measurements as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.overhead.peers import PEERS
from benchmarks.overhead.turns import Share
from benchmarks.overhead.worker import GRANULARITIES, Job, Measured, Outcome

Found = Sequence[tuple[Job, Outcome]]

#: The most that self time and dispatch may make of a step in which nothing is watched.
TARGETS = {
    "blocks": {"w1": 1.02, "w2": 1.02, "w3": 1.10},
    "default": {"w1": 1.04, "w2": 1.04, "w3": 1.15},
    "leaf": {"w1": 1.13, "w2": 1.13, "w3": 1.30},
}
UNRECORDED = 1.005
COMPILED = {"blocks": 1.02}
WORDS = {
    "control": "nothing (control)",
    "blocks": "blocks",
    "default": "blocks and branches (default)",
    "leaf": 'every module (`"**"`)',
}


def total(measured: Measured) -> float | None:
    """1 + self time + dispatch, as shares of the rest of the step."""
    if measured.share is None:
        return None
    share = Share(**measured.share)
    return 1 + share.self + share.dispatch


def interval(measured: Measured) -> str:
    if measured.ratio is None:
        return "–"
    value, low, high = measured.ratio
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def _markdown(head: list[str], rows: list[list[str]], left: int = 1) -> list[str]:
    return [
        "| " + " | ".join(head) + " |",
        "| " + " | ".join(["---"] * left + ["---:"] * (len(head) - left)) + " |",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]


def _verdict(value: float | None, target: float | None) -> str:
    if value is None or target is None:
        return "–"
    return "yes" if value <= target else "**no**"


# -- the tables ----------------------------------------------------------------------------------------


def _hooks(measured: Measured) -> list[str]:
    """Self time, dispatch and both."""
    if measured.share is None:
        return ["–", "–", "–"]
    share = Share(**measured.share)
    own = f"{100 * share.self:.2f} [{100 * share.low:.2f}, {100 * share.high:.2f}]"
    return [own, _percent(share.dispatch), _number(total(measured))]


def own(found: Found, *, bf16: bool = False, one_pass: bool = True) -> Found:
    """The eager measurements of gradscope, of one kind."""
    return [
        (job, out)
        for job, out in found
        if job.backend is None
        and (job.bf16, job.one_pass) == (bf16, one_pass)
        and job.watchers[0] not in PEERS
    ]


def eager(found: Found, *, bf16: bool = False, one_pass: bool = True) -> list[str]:
    """gradscope without torch.compile."""
    rows: list[list[str]] = []
    for job, out in own(found, bf16=bf16, one_pass=one_pass):
        for name, measured in out.recorded.items():
            if measured.error:
                rows.append([f"{job.workload}, {WORDS[name]}", f"failed: {_cell(measured.error)}"])
                continue
            target = TARGETS.get(name, {}).get(job.workload)
            rows.append(
                [
                    f"{job.workload}, {WORDS[name]}",
                    *_hooks(measured),
                    _number(target, 2),
                    _verdict(total(measured), target),
                    interval(measured),
                    _number(measured.peak),
                    _number(measured.slow_peak),
                    _percent(measured.limit),
                ]
            )
        for name, measured in out.unrecorded.items():
            rows.append(
                [
                    f"{job.workload}, {WORDS[name]}, not recorded",
                    *_hooks(measured),
                    _number(UNRECORDED),
                    _verdict(total(measured), UNRECORDED),
                    interval(measured),
                    "–",
                    "–",
                    "–",
                ]
            )
    head = ["watched", "self, %", "dispatch, %", "1 + both", "to reach", "reached", "interleaved"]
    return _markdown([*head, "peak memory", "slow step's", "limit, %"], rows)


def compiled(found: Found) -> list[str]:
    """gradscope under torch.compile."""
    rows: list[list[str]] = []
    for job, out in found:
        if job.backend is None:
            continue
        kind = f"{job.workload}, {'bf16' if job.bf16 else 'fp32'}"
        for part, said in ((out.recorded, ""), (out.unrecorded, ", not recorded")):
            for name, measured in part.items():
                if measured.error:
                    rows.append([f"{kind}, {WORDS[name]}", f"failed: {_cell(measured.error)}"])
                    continue
                target = UNRECORDED if said else COMPILED.get(name)
                rows.append(
                    [
                        f"{kind}, {WORDS[name]}{said}",
                        interval(measured),
                        _number(target, 3),
                        resolved(measured, target),
                        _number(measured.peak),
                        "–" if measured.breaks is None else str(measured.breaks),
                    ]
                )
    head = ["watched", "interleaved", "to reach", "reached", "peak memory", "graph breaks"]
    return _markdown(head, rows)


def resolved(measured: Measured, target: float | None) -> str:
    """Whether a target is reached, where there is nothing but the interval to tell."""
    if measured.ratio is None or target is None:
        return "–"
    _, low, high = measured.ratio
    if high <= target:
        return "yes"
    return "**no**" if low > target else "not resolved"


def by_peer(found: Found) -> Iterator[tuple[str, dict[str, Measured]]]:
    """For each peer what was measured of it, by workload."""
    for name in PEERS:
        yield name, {job.workload: out.recorded[name] for job, out in found if name in job.watchers}


def peers(found: Found) -> list[str]:
    """The other tools, every step."""
    rows: list[list[str]] = []
    for name, measured in by_peer(found):
        for workload, m in measured.items():
            if m.error:
                rows.append([name, m.version or "–", workload, f"failed: {_cell(m.error)}", "–", "–"])
                continue
            rows.append([name, m.version, workload, interval(m), _number(total(m)), _number(m.peak)])
    head = ["tool", "version", "workload", "interleaved", "hooks alone", "peak memory"]
    return _markdown(head, rows, left=3)


def _short(measured: Measured | None, *, own: bool = True) -> str:
    if measured is None:
        return "–"
    if measured.ratio is None:
        return f"failed: {_cell(measured.error)}"
    value, low, high = measured.ratio
    whole = f"{value:.2f} [{low:.2f}, {high:.2f}]"
    return f"{_number(total(measured))}; {whole}" if own else whole


def short(found: Found) -> list[str]:
    """fp32, eager: gradscope beside the limit and its peers."""
    workloads = ("w1", "w2", "w3")
    mine = {job.workload: out for job, out in own(found)}
    rows: list[list[str]] = []
    for name in GRANULARITIES:
        cells = [_short(mine[w].recorded.get(name)) if w in mine else "–" for w in workloads]
        targets = " / ".join(f"{TARGETS[name][w]:.2f}" for w in workloads)
        rows.append([f"gradscope, {WORDS[name]}", *cells, targets])
    cells = [_short(mine[w].unrecorded.get("default")) if w in mine else "–" for w in workloads]
    rows.append(["gradscope, default, steps that are not recorded", *cells, f"{UNRECORDED:.3f}"])
    for name in GRANULARITIES:
        limits = [mine[w].recorded[name].limit if w in mine else None for w in workloads]
        cells = ["–" if limit is None else f"{1 + limit:.3f}" for limit in limits]
        rows.append([f"the limit, {WORDS[name]}", *cells, ""])
    for name, measured in by_peer(found):
        rows.append([name, *(_short(measured.get(w), own=False) for w in workloads), ""])
    return _markdown(["watched by", *workloads, "to reach"], rows)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())[:200]
