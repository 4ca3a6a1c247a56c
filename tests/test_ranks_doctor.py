"""The doctor under DDP, and gradscope in a script that torchrun starts."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rank_processes import alone, batches, loss_of, net, run, share
from test_ranks import same_as_alone
from torch.nn.parallel import DistributedDataParallel as DDP

import gradscope
from gradscope.collect import engine, merging, ranks
from gradscope.experiment.doctor import DoctorReport


def examined(rank: int, *, fault: str = "") -> DoctorReport:
    """``fault``: what is broken in the recorder meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        if fault == "rank-local norms":
            # As if nobody knew of other ranks: gradients are read before they are reduced.
            patch.setattr(ranks.Ranks, "many", property(lambda self: False))
            early = engine.after_backward
            patch.setattr(engine, "after_backward", lambda f, *, last=False: early(f))
        elif fault == "first rank":
            plain = merging.pool
            patch.setattr(merging, "pool", lambda names, values: plain(names, values[:1]))
        elif fault == "no share":
            patch.setattr(merging, "_POWER", merging._POWER * 0)
        model = DDP(net())
        return gradscope.doctor(model, share(batches()[0], rank), loss_of, seconds=0, progress=False)


FAULTS = {
    "rank-local norms": {"activation", "output_grad", "param_grad"},
    "first rank": {"activation", "output_grad"},
    "no share": {"output_grad"},
}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    cases = {name: partial(examined, fault=name) for name in ("", *FAULTS)}
    return run(cases, tmp_path_factory.mktemp("doctor"), seconds=240)


def test_the_doctor_finds_nothing_under_ddp(reports: dict[str, list[Any]]) -> None:
    for report in reports[""]:
        assert isinstance(report, DoctorReport), report
        assert report.ok, str(report)
        check = next(c for c in report.checks if c.name == "values over ranks")
        assert check.ok and int(check.detail.split()[0]) > 80 and "0 local" in check.detail


@pytest.mark.parametrize("fault", FAULTS)
def test_the_doctor_finds_values_of_one_rank(reports: dict[str, list[Any]], fault: str) -> None:
    for report in reports[fault]:
        assert isinstance(report, DoctorReport), report
        assert not report.ok
        assert {w.signal for w in report.wrong} == FAULTS[fault]
        assert all("the 2 ranks together have" in w.why for w in report.wrong)


SCRIPT = """
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from rank_processes import batches, net, share, train
from torch.nn.parallel import DistributedDataParallel as DDP

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    record = train(DDP(net()), [share(b, rank) for b in batches()])
    record.save(Path(sys.argv[1]) / f"{rank}.jsonl")
    dist.destroy_process_group()
"""


def test_under_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    single = alone()
    for rank in (0, 1):
        record = gradscope.Record.load(tmp_path / f"{rank}.jsonl")
        assert record.header["parallelism"] == "DDP, 2 ranks"
        same_as_alone(record, single)
