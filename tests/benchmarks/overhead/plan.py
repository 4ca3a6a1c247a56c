"""What is measured, one process after the other, and the command line."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from benchmarks.overhead import peers, report
from benchmarks.overhead.turns import CADENCE
from benchmarks.overhead.worker import GRANULARITIES, Job, Measured, Outcome, outcome, parse

from gradscope.statistics import one_pass

Say = Callable[[str], None]
_TESTS = Path(__file__).resolve().parents[2]


def backend() -> str:
    """Inductor where it finds a compiler, else what needs none."""
    found = torch.cuda.is_available() or shutil.which(os.environ.get("CXX", "g++"))
    return "inductor" if found else "aot_eager"


def jobs(*, quick: bool, device: str) -> list[Job]:
    """Every measurement of gradscope."""
    few, many = (CADENCE, CADENCE) if quick else (CADENCE, 2 * CADENCE)

    def job(workload: str, bf16: bool = False, backend: str | None = None) -> Job:
        # Ten steps at least, of which one is slow; where steps are short, more.
        watchers = GRANULARITIES if backend else ("control", *GRANULARITIES)
        limits = {"rounds": many, "least": few, "seconds": 60.0, "unrecorded": CADENCE // 2}
        return Job(workload, watchers, bf16, backend, device=device, **limits)  # type: ignore[arg-type]

    eager = [job(w, bf16) for bf16 in ((False,) if quick else (False, True)) for w in ("w1", "w2", "w3")]
    compiled = [job("w1", False, backend()), *(job("w3/4", bf16, backend()) for bf16 in (False, True))]
    if quick:
        return eager
    without = [replace(job(w), one_pass=False) for w in ("w1", "w2", "w3")]
    return [*eager, *(without if one_pass.available() else ()), *compiled]


def peer_jobs(*, quick: bool, device: str) -> Iterator[tuple[str, Job]]:
    """Every measurement of a peer, with its name."""
    for workload in ("w3",) if quick else ("w1", "w3"):
        for name in peers.PEERS:
            limits = {"rounds": 3} if quick else {"rounds": CADENCE, "least": 3, "seconds": 15.0}
            yield name, Job(workload, (name,), device=device, **limits)  # type: ignore[arg-type]


def run(job: Job, python: Path, variables: dict[str, str]) -> Outcome:
    """Measure in a process of its own; one that dies gives a reason instead of numbers."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "outcome.json"
        path = os.pathsep.join((str(_TESTS), str(_TESTS.parent), os.environ.get("PYTHONPATH", "")))
        own = {
            "PYTHONPATH": path,
            "OMP_NUM_THREADS": "1",
            "KINETO_LOG_LEVEL": "6",
            # Every compilation is paid in full, and none is left behind.
            "TORCHINDUCTOR_CACHE_DIR": folder,
            **variables,
        }
        command = [python, "-m", "benchmarks.overhead.worker", json.dumps(asdict(job)), str(out)]
        done = subprocess.run(
            command, cwd=folder, env={**os.environ, **own}, capture_output=True, text=True
        )
        if out.exists():
            return outcome(out.read_text())
        said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return Outcome(recorded={name: Measured(error=said) for name in job.watchers})


def measure(*, quick: bool, peers_env: Path, results: Path, say: Say) -> list[tuple[Job, Outcome]]:
    """Everything, in turn; what ``results`` has already is not measured again."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    python, missing = peers.install(peers_env, say)
    waiting = [(job, Path(sys.executable), {}, "") for job in jobs(quick=quick, device=device)]
    for name, job in peer_jobs(quick=quick, device=device):
        error = missing.get(peers.PEERS[name].distribution, "")
        waiting.append((job, python, peers.environment(python), error))
    found: list[tuple[Job, Outcome]] = []
    began = time.monotonic()
    for n, (job, python, variables, error) in enumerate(waiting):
        what = f"{job.workload}, {'bf16' if job.bf16 else 'fp32'}, {job.backend or 'eager'}"
        what += "" if job.one_pass else ", without the extension modules"
        minutes = (time.monotonic() - began) / 60
        say(f"{minutes:4.1f} min, {n + 1} of {len(waiting)}: {what}: {', '.join(job.watchers)}")
        file = results / f"{n + 1:02}.json"
        if file.exists() and parse(file.with_suffix(".job").read_text()) == job:
            seen = outcome(file.read_text())
        elif error:
            seen = Outcome(recorded={name: Measured(error=error) for name in job.watchers})
        else:
            seen = run(job, python, variables)
        file.with_suffix(".job").write_text(json.dumps(asdict(job)))
        file.write_text(json.dumps(asdict(seen)))
        for name, measured in seen.recorded.items():
            if measured.error:
                say(f"    {name}: {measured.error.splitlines()[0]}")
        found.append((job, seen))
    say(f"{(time.monotonic() - began) / 60:.1f} minutes")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python tests/benchmarks/overhead", description="What it costs to watch a model."
    )
    parser.add_argument("--quick", action="store_true", help="fp32 and eager only, few rounds")
    parser.add_argument("--out", type=Path, help="write the tables there, as Markdown")
    parser.add_argument("--peers-env", type=Path, help="keep the peers' environment there, or use it")
    parser.add_argument("--results", type=Path, help="keep each result there; go on from those it has")
    options = parser.parse_args()

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        env = options.peers_env or Path(folder) / "peers"
        results = options.results or Path(folder) / "results"
        results.mkdir(parents=True, exist_ok=True)
        found = measure(quick=options.quick, peers_env=env, results=results, say=say)
    lines = report.page(found, quick=options.quick)
    print("\n".join(lines))
    if options.out is not None:
        options.out.write_text("\n".join(lines), encoding="utf-8")
