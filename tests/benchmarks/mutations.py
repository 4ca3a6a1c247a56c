"""Breaks the collector on purpose, one line at a time, and shows which tests notice.

    python tests/benchmarks/mutations.py [--group GROUP] [--only NAME] [--all]

``mutations/GROUP.txt`` holds the mutations of each group of tests, written like a patch: the name and the
file in the package, the test files that can notice it where that are few, the lines that stand there
exactly once, and those that stand there instead.

Each mutation is made in a copy of the package in a temporary folder, and tests run there, which must go
red. By default the hard-case tests of its group stop at the first that does. With ``--all`` every test
of the suite must be seen red once: a mutation runs those that none before it has turned red, and the
others only where none of these notices it. A mutation that no test notices is printed as SURVIVED, a
test that none turns red as NEVER RED; the exit status is 1 where there is either.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
#: The hard-case suite and the gradient baseline, in groups: a mutation is of the group whose tests can
#: notice it.
TESTS: Final = {
    "eager": (
        "test_training_loops.py",
        "test_backward_passes.py",
        "test_gradient_scaling.py",
        "test_trouble.py",
        "test_hard_adapters.py",
        "test_hard_surgery.py",
        "test_hard_modules.py",
        "test_hard_tensors.py",
        "test_hard_calls.py",
        "test_hard_scale.py",
        "test_hard_threads.py",
        "test_odd_models.py",
        "test_hard_properties.py",
        "test_hard_memory.py",
        "test_lifetime.py",
    ),
    "compiled": ("test_compile.py",),
    "ranks": ("test_ranks.py", "test_ranks_loops.py", "test_ranks_trouble.py", "test_merging.py"),
    "gate": ("test_gate.py", "test_gate_parts.py", "test_gate_rates.py"),
}
#: A mutation that makes a test hang is noticed, too; the tests after it are not run.
SECONDS: Final = 420


@dataclass(frozen=True)
class Mutation:
    """Lines of the package, broken.

    Attributes:
        group: the tests that can notice it.
        name: what is broken.
        file: where, relative to the package.
        tests: the test files that can notice it.
        old: the lines that are there, exactly once.
        new: what stands there instead.
    """

    group: str
    name: str
    file: str
    tests: tuple[str, ...]
    old: str
    new: str

    def applied_to(self, text: str) -> str:
        """The file's text with the mutation."""
        if text.count(self.old) != 1:
            raise SystemExit(f"{self.name}: its lines are {text.count(self.old)} times in {self.file}")
        return text.replace(self.old, self.new)


def read_mutations() -> list[Mutation]:
    """All mutations, each of which has its lines in the package as it is."""
    found: list[Mutation] = []
    for group in TESTS:
        text = (Path(__file__).parent / "mutations" / f"{group}.txt").read_text(encoding="utf-8")
        for entry in text.split("\n# "):
            head, *lines = entry.removeprefix("# ").splitlines()
            name, file, *few = head.split(": ")
            files = tuple(f"{word}.py" for word in few[0].split()) if few else TESTS[group]
            old, new = ("".join(x[1:] + "\n" for x in lines if x[:1] == sign) for sign in "-+")
            found.append(Mutation(group, name, file, files, old, new))
            found[-1].applied_to((ROOT / "gradscope" / file).read_text(encoding="utf-8"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="mutations whose name holds this")
    parser.add_argument("--group", choices=TESTS, help="mutations and tests of this group only")
    parser.add_argument("--all", action="store_true", help="until every test has been seen red")
    arguments = parser.parse_args()
    chosen = [m for m in read_mutations() if arguments.only in m.name]
    chosen = [m for m in chosen if arguments.group in (None, m.group)]
    groups = dict.fromkeys(m.group for m in chosen)
    unseen = {group: _green_tests(group) for group in groups} if arguments.all else {}
    survived = 0
    for mutation in chosen:
        files = [f"tests/{name}" for name in mutation.tests]
        waiting = [x for x in unseen.get(mutation.group, []) if x.split("::")[0] in files]
        red = _red(mutation, waiting) if waiting else []
        red = red or _red(mutation, files, stop=True)
        if arguments.all:
            unseen[mutation.group] = [x for x in unseen[mutation.group] if x not in red]
        survived += not red
        names = ", ".join(test.split("::")[-1] for test in red)
        print(f"{mutation.group:9} {mutation.name:50}  {names or 'SURVIVED'}", flush=True)
    never = [test for tests in unseen.values() for test in tests]
    for test in never:
        print(f"NEVER RED  {test}")
    if arguments.all:
        print(f"{len(chosen)} mutations, {survived} survived; {len(never)} tests were never red")
    sys.exit(survived > 0 or len(never) > 0)


def _green_tests(group: str) -> list[str]:
    """The tests of a group, all of which pass on the package as it is."""
    green, red = _run(ROOT, [f"tests/{name}" for name in TESTS[group]])
    if red:
        raise SystemExit(f"red without any mutation: {', '.join(red)}")
    print(f"{len(green)} tests of {group!r} are green without a mutation", flush=True)
    return green


def _red(mutation: Mutation, tests: Sequence[str], *, stop: bool = False) -> list[str]:
    """Those of the tests that are red with the mutation; the first one only where told to stop there."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in ("gradscope", "tests"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / part, copy / part, ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", copy)
        target = copy / "gradscope" / mutation.file
        broken = mutation.applied_to(target.read_text(encoding="utf-8"))
        target.write_text(broken, encoding="utf-8")
        return _run(copy, tests, *(["-x"] if stop else []))[1]


def _run(folder: Path, tests: Sequence[str], *options: str) -> tuple[list[str], list[str]]:
    """Tests that are green, and tests that are red."""
    command = [sys.executable, "-m", "pytest", "-v", "-n0", "--tb=no", "-p", "no:cacheprovider"]
    command += ["--hypothesis-profile=mutations", *options]
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        try:
            done = subprocess.run(
                [*command, *tests], cwd=folder, env=environment, stdout=said, timeout=SECONDS, check=False
            )
            code = done.returncode
        except subprocess.TimeoutExpired:
            code = 1
        said.seek(0)
        text = said.read()
    if code not in (0, 1):
        raise SystemExit(f"pytest ended with {code}\n{text[-2000:]}")
    found = re.findall(r"^(tests/\S+?::.*?) (PASSED|FAILED|ERROR)\b", text, re.MULTILINE)
    red = dict.fromkeys(test for test, word in found if word != "PASSED")
    green = [test for test, word in found if word == "PASSED" and test not in red]
    return green, list(red)


if __name__ == "__main__":
    main()
