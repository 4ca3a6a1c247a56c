"""Breaks the collector on purpose, one line at a time, and shows which tests notice.

    python tests/benchmarks/mutations.py [--only NAME] [--all]

Each mutation is made in a copy of the package in a temporary folder; the hard-case tests run there and
must go red. A mutation that no test notices is printed as SURVIVED, and the exit status is 1. Without
``--all`` the tests of a mutation stop at the first that is red.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
TESTS: Final = (
    "test_training_loops.py",
    "test_backward_passes.py",
    "test_gradient_scaling.py",
    "test_trouble.py",
    "test_hard_surgery.py",
    "test_hard_modules.py",
    "test_hard_threads.py",
    "test_hard_memory.py",
    "test_odd_models.py",
    "test_lifetime.py",
    "test_statistics.py",
)


@dataclass(frozen=True)
class Mutation:
    """One line of the package, broken.

    Attributes:
        name: what is broken.
        file: where, relative to the package.
        old: the text that is there, exactly once.
        new: what stands there instead.
    """

    name: str
    file: str
    old: str
    new: str


MUTATIONS: Final = (
    Mutation("calls not counted", "collect/sampling.py", "p.counts[site] = call.index + 1", "pass"),
    Mutation(
        "recomputation recorded again",
        "collect/recorder.py",
        "                self._sampler.recomputed(mine[0], site, output)\n",
        "                self._sampler.output(mine[0], site, args, kwargs, output, grad_mode=True)\n",
    ),
    Mutation(
        "re-entrant recomputation ignored",
        "collect/recorder.py",
        "                self._sampler.recomputed(mine[0], site, output)\n",
        "                pass\n",
    ),
    Mutation(
        "a second backward pass not noticed",
        "collect/sampling.py",
        "slot.repeated = slot.repeated or slot.backward != backward",
        "pass",
    ),
    Mutation(
        "evaluations recorded",
        "collect/recorder.py",
        "        if not self._grad_mode:\n            return  # an evaluation: not of any step\n",
        "",
    ),
    Mutation(
        "half a forward kept after an exception",
        "collect/open_step.py",
        "self.forget([p for p in self.passes if p.begun and not p.complete])",
        "pass",
    ),
    Mutation(
        "abandoned forwards kept",
        "collect/open_step.py",
        "if not p.begun and p.graph and not any(r() for r in p.graph)])",
        "if False])",
    ),
    Mutation(
        "only the last micro-batch",
        "collect/open_step.py",
        "return accumulated or complete or ([] if with_gradient else passes)",
        "return (accumulated or complete or ([] if with_gradient else passes))[-1:]",
    ),
    Mutation(
        "saliency maps counted as training",
        "collect/open_step.py",
        "return accumulated or complete or ([] if with_gradient else passes)",
        "return complete or ([] if with_gradient else passes)",
    ),
    Mutation(
        "gradients thrown away are kept",
        "collect/recorder.py",
        "        elif self._accumulation.cleared():",
        "        elif False:",
    ),
    Mutation(
        "scale not divided out of gradients",
        "collect/recorder.py",
        "        if scale is not None:\n            p.scale = scale\n",
        "",
    ),
    Mutation(
        "second moments divided by the scale once",
        "collect/assembly.py",
        "float(v) / by / by if power == 2",
        "float(v) / by if power == 2",
    ),
    Mutation(
        "an overflow is a step like any other",
        "collect/assembly.py",
        "        if skipped:",
        "        if False:",
    ),
    Mutation(
        "another thread's scale taken",
        "collect/scaling.py",
        "for scale, thread in self._running.values() if thread == me)",
        "for scale, thread in self._running.values())",
    ),
    Mutation(
        "forwards of another thread recorded",
        "collect/recorder.py",
        "return p.mine if p is not None and p.root_open else self._grad_mode",
        "return self._grad_mode or (p is not None and p.root_open)",
    ),
    Mutation(
        "replaced layers not looked for",
        "collect/structure.py",
        "    def changed(self) -> bool:\n",
        "    def changed(self) -> bool:\n        return False\n",
    ),
    Mutation(
        "a change within a step not marked",
        "collect/recorder.py",
        "self._step.newest.error = _CHANGED",
        "pass",
    ),
    Mutation(
        "sparse gradients not coalesced",
        "statistics/moments.py",
        "t = t.coalesce().values()",
        "t = t._values()",
    ),
    Mutation(
        "imaginary parts dropped",
        "statistics/moments.py",
        "return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t",
        "return t.real if t.is_complex() else t",
    ),
    Mutation(
        "an optimizer inside the backward pass not seen in time",
        "collect/optimizers.py",
        "            self._early[i] = {",
        "            self._late = {",
    ),
    Mutation(
        "the optimizer's other model ends the step",
        "collect/optimizers.py",
        "if i is not None and entries[i].tensor() is parameter:",
        "if i is None or entries[i].tensor() is parameter:",
    ),
    Mutation(
        "frozen parameters called unreached",
        "collect/parameters.py",
        'readings.absent[i] = "frozen"',
        'readings.absent[i] = "no gradient path"',
    ),
    Mutation(
        "hooks left on leaves",
        "collect/passes.py",
        "                    handle.remove()\n",
        "                    pass\n",
    ),
    Mutation(
        "hooks left behind by close",
        "collect/attachment.py",
        "        handle.remove()\n",
        "        pass\n",
    ),
    Mutation(
        "dead outputs have gradient zero",
        "collect/assembly.py",
        'else "no gradient path"\n',
        'else ""\n',
    ),
    Mutation(
        "in-place change of a Linear's view not followed",
        "collect/sampling.py",
        "base = tensor._base if slot.site in self._linear else None",
        "base = None",
    ),
    Mutation(
        "half precision squared in half precision",
        "statistics/sample.py",
        "            x = x.float()\n",
        "            x = (x * x).float().sqrt()\n",
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="mutations whose name holds this")
    parser.add_argument("--all", action="store_true", help="name every test that goes red")
    arguments = parser.parse_args()
    survived = 0
    for mutation in MUTATIONS:
        if arguments.only in mutation.name:
            red = tests_that_notice(mutation, everything=arguments.all)
            survived += not red
            print(f"{mutation.name:60}  {', '.join(red) or 'SURVIVED'}", flush=True)
    sys.exit(survived > 0)


def tests_that_notice(mutation: Mutation, *, everything: bool) -> list[str]:
    """The names of the tests that are red with the mutation."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in ("gradscope", "tests"):
            ignored = shutil.ignore_patterns("__pycache__", "benchmarks")
            shutil.copytree(ROOT / part, copy / part, ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", copy)
        target = copy / "gradscope" / mutation.file
        text = target.read_text(encoding="utf-8")
        if text.count(mutation.old) != 1:
            raise SystemExit(
                f"{mutation.name}: its line is {text.count(mutation.old)} times in {target.name}"
            )
        target.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-q", "-n0", "--tb=no", "-p", "no:cacheprovider"]
        command += [] if everything else ["-x"]
        done = subprocess.run(
            [*command, *(f"tests/{name}" for name in TESTS)],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode not in (0, 1):
            raise SystemExit(
                f"{mutation.name}: pytest ended with {done.returncode}\n{done.stdout[-2000:]}"
            )
        return re.findall(r"^(?:FAILED|ERROR) \S+::(\S+)", done.stdout, re.MULTILINE)


if __name__ == "__main__":
    main()
