"""The whole page: what was measured and how, the tables, and what is not reached."""

from __future__ import annotations

import platform
import textwrap
from pathlib import Path

import torch
import transformers
from benchmarks.overhead import table
from benchmarks.overhead.peers import PEERS
from benchmarks.overhead.table import (
    COMPILED,
    TARGETS,
    UNRECORDED,
    WORDS,
    Found,
    interval,
    resolved,
    total,
)
from benchmarks.overhead.workloads import WORKLOADS

import gradscope
from gradscope.collect.quick import available

#: What the page says around its tables; paragraphs are filled anew.
_MADE = """
Made by `{command}` with gradscope {gradscope}, torch {torch}, transformers {transformers} and Python
{python} on {processor}{threads}. gradscope's extension modules were {built}. {gpu}
"""
_HOW = """
A step is forward, cross-entropy, backward and AdamW; unwatched, in fp32 and eager, it takes {plain}.
Watched, each step is recorded, and each tenth has the slow statistics: the default.

*Self* is the time inside the watcher's hooks over the rest of the same step, in percent: the mean over
ten consecutive steps of which one is slow; the median of all such means, the smallest and the largest.
*Dispatch* is the number of hooks times what torch takes to call one that does nothing, measured in the
same process (a forward hook {forward:.2f} µs, a tensor hook {tensor:.2f} µs). The targets are for
1 + self + dispatch. *Interleaved* is the ratio of {clock}, watched over unwatched: the models take
turns in one process, in random order; the median over pairs, as the mean over ten steps, and its 95 %
bootstrap interval. Whatever else runs on the machine moves it: the control says how much.

*Peak memory* is the ratio of the peaks of torch's allocator, parameters and optimizer included, in an
ordinary recorded step, and in a slow one, where the update ratio holds a copy of the parameters.
*Limit* is the time of reading once what is watched (outputs, their gradients, the parameters'
gradients) at the memory bandwidth that the same process measured ({speed:.1f} GB/s), in percent of the
unwatched step.
"""
_SHORT = """
fp32, eager, every step. Of gradscope 1 + self + dispatch, then the interleaved ratio with its 95 %
interval; of the [peers](#peers) the interleaved ratio.
"""
_COMPILED = """
Hooks are part of the graph there, so that only the interleaved ratio tells. *Graph breaks* are those of
the watched model's compilation.
"""
_PEERS = """
Each is used as its documentation says, every step. *Hooks alone* is 1 + self + dispatch, without what a
tool does in other threads. What runs in another process, as most of wandb does, is not counted at all.
What nvdlfw-inspect looks at is up to its user, who calls it for each tensor.
"""


def page(found: Found, *, quick: bool) -> list[str]:
    """The lines of the page."""
    lines = ["# What watching costs", "", *_how(found, quick=quick)]
    lines += ["## In short", "", *_filled(_SHORT), *table.short(found)]
    lines += ["## Targets that are not reached", "", *missed(found)]
    lines += ["## fp32, eager", "", *table.eager(found)]
    if table.own(found, one_pass=False):
        lines += ["## fp32, eager, without the extension modules", ""]
        lines += table.eager(found, one_pass=False)
    if not quick:
        backends = " and ".join(sorted({job.backend for job, _ in found if job.backend}))
        lines += ["## bf16 (autocast), eager", "", "The targets are those of fp32.", ""]
        lines += [*table.eager(found, bf16=True), f"## torch.compile of the whole model ({backends})", ""]
        lines += [*_filled(_COMPILED), *table.compiled(found)]
    lines += ["## Peers", "", *_filled(_PEERS)]
    lines += [f"- {name}: {peer.records}." for name, peer in PEERS.items()]
    return [*lines, "", *table.peers(found)]


def _how(found: Found, *, quick: bool) -> list[str]:
    own = [(job, out) for job, out in found if out.bandwidth]
    plain = ", ".join(f"{job.workload} {1000 * out.plain_s:.0f} ms" for job, out in table.own(found))
    idle = own[0][1].idle
    cuda = torch.cuda.is_available()
    unseen = "No GPU has run this benchmark yet: there it takes CUDA events and the GPU's allocator."
    made = _MADE.format(
        command="python tests/benchmarks/overhead" + " --quick" * quick,
        gradscope=gradscope.__version__,
        torch=torch.__version__,
        transformers=transformers.__version__,
        python=platform.python_version(),
        processor=_processor(),
        threads="" if cuda else ", one thread",
        built="built" if available() else "not built: torch's operations do its work",
        gpu="" if cuda else unseen,
    )
    how = _HOW.format(
        plain=plain,
        forward=1e6 * idle["forward"],
        tensor=1e6 * idle["tensor"],
        clock="times between CUDA events" if cuda else "CPU times",
        speed=sorted(out.bandwidth for _, out in own)[len(own) // 2] / 1e9,
    )
    workloads = [f"- **{name}**: {WORKLOADS[name]}." for name in ("w1", "w2", "w3", "w3/4")]
    return [*_filled(made), *workloads, "", *_filled(how)]


def _filled(text: str) -> list[str]:
    lines: list[str] = []
    for paragraph in text.strip().split("\n\n"):
        lines += [*textwrap.wrap(paragraph, 105, break_on_hyphens=False), ""]
    return lines


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    listed = Path("/proc/cpuinfo")
    if listed.exists():
        for line in listed.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def missed(found: Found) -> list[str]:
    """A sentence for each target that is not reached, and for each contradiction."""
    lines: list[str] = []
    for job, out in found:
        if job.watchers[0] in PEERS:
            continue
        kind = f"{job.workload}, {'bf16' if job.bf16 else 'fp32'}"
        kind += ", compiled" if job.backend is not None else ""
        kind += "" if job.one_pass else ", without the extension modules"
        for part, said in ((out.recorded, ""), (out.unrecorded, ", not recorded")):
            for name, m in part.items():
                value = total(m)
                target = UNRECORDED if said else TARGETS.get(name, {}).get(job.workload)
                if value is not None and target is not None and value > target:
                    lines.append(f"- {kind}, {WORDS[name]}{said}: {value:.3f}, to reach {target:g}.")
                if job.backend is not None and m.ratio is not None:
                    target = UNRECORDED if said else COMPILED.get(name)
                    if resolved(m, target) == "**no**":
                        lines.append(
                            f"- {kind}, {WORDS[name]}{said}: {interval(m)}, to reach {target:g}."
                        )
                if m.peak is not None and m.peak > 1.005:
                    lines.append(f"- {kind}, {WORDS[name]}: peak memory {m.peak:.3f}, to reach 1.00.")
                if value is not None and m.ratio is not None and not m.ratio[1] <= value <= m.ratio[2]:
                    lines.append(
                        f"- {kind}, {WORDS[name]}{said}: the interleaved ratio, {interval(m)}, and"
                        f" 1 + self + dispatch, {value:.3f}, disagree."
                    )
    return [*(lines or ["None."]), ""]
