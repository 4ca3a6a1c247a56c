"""Two ranks, each with half of the batch, record what one process records of the whole batch."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from rank_processes import BATCH, alone, batches, loss_of, net, run, sgd, share, train
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

import gradscope
from gradscope.experiment.doctor.oracle import Expected, expected_values
from gradscope.layers.naming import callable_layers


def data(rank: int) -> list[Any]:
    return [share(batch, rank) for batch in batches()]


def ddp(rank: int, *, micro: int = 1, **options: Any) -> gradscope.Record:
    model = DDP(net(), **options)
    sync = None if micro == 1 else lambda last: None if last else model.no_sync()
    return train(model, data(rank), micro=micro, sync=sync)


def inner(rank: int) -> gradscope.Record:
    """The model is watched before it is wrapped."""
    model = net()
    return train(DDP(model), data(rank), watched=model)


def clipped(rank: int) -> gradscope.Record:
    return train(DDP(net()), data(rank), clip=0.1)


def fsdp(rank: int, *, micro: int = 1, synchronise: bool = True, **options: Any) -> gradscope.Record:
    model: Any = net()
    for block in model.blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)
    sync = None if synchronise else model.set_requires_gradient_sync
    return train(model, data(rank), micro=micro, sync=sync)


def fsdp_root(rank: int) -> gradscope.Record:
    model: Any = fully_shard(net())
    return train(model, data(rank))


def fsdp_later(rank: int) -> gradscope.Record:
    """The model is watched before it is sharded."""
    model: Any = net()
    optimizers: list[Any] = []

    def shard(model: Any) -> list[torch.optim.Optimizer]:
        if not optimizers:
            for block in model.blocks:
                fully_shard(block)
            fully_shard(model)
            optimizers.append(sgd(model))
        return optimizers

    with gradscope.watch(model, slow_every=2, warn=False):
        shard(model)
        return train(model, data(rank), optimizers=shard)


def fsdp_frozen(rank: int) -> gradscope.Record:
    model: Any = frozen(net())
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    return train(model, data(rank), optimizers=trained)


def frozen(model: Any) -> Any:
    model.stem.requires_grad_(False)
    model.blocks[1].requires_grad_(False)
    return model


def trained(model: Any) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)]


def ddp_frozen(rank: int) -> gradscope.Record:
    return train(DDP(frozen(net())), data(rank), optimizers=trained)


def fsdp_clipped(rank: int) -> gradscope.Record:
    model: Any = fully_shard(net())
    return train(model, data(rank), clip=0.1)


PLAIN = {
    "ddp": ddp,
    "ddp, bucket views": partial(ddp, gradient_as_bucket_view=True),
    "ddp, static graph": partial(ddp, static_graph=True),
    "ddp, unused parameters looked for": partial(ddp, find_unused_parameters=True),
    "ddp, watched inside": inner,
    "fsdp": fsdp,
    "fsdp, kept after forward": partial(fsdp, reshard_after_forward=False),
    "fsdp, root alone": fsdp_root,
    "fsdp, watched before": fsdp_later,
}
FROZEN = {"ddp, frozen": ddp_frozen, "fsdp, frozen": fsdp_frozen}
OTHERS = {
    "ddp, accumulated without sync": (partial(ddp, micro=2), {"micro": 2}),
    "ddp, clipped": (clipped, {"clip": 0.1}),
    "fsdp, clipped": (fsdp_clipped, {"clip": 0.1}),
    "fsdp, accumulated": (partial(fsdp, micro=2), {"micro": 2}),
    "fsdp, kept, accumulated": (partial(fsdp, micro=2, reshard_after_forward=False), {"micro": 2}),
    "fsdp, accumulated without sync": (partial(fsdp, micro=2, synchronise=False), {"micro": 2}),
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    cases = {**PLAIN, **FROZEN, **{name: case for name, (case, _) in OTHERS.items()}}
    return run(cases, tmp_path_factory.mktemp("ranks"), seconds=240)


def both(ranks: dict[str, list[Any]], name: str) -> list[gradscope.Record]:
    for found in ranks[name]:
        assert isinstance(found, tuple), found
        assert found[1] == [], found[1]
    return [found[0] for found in ranks[name]]


def keyed(record: gradscope.Record, step: int) -> dict[tuple[str, ...], tuple[float, str]]:
    table = record.table(step=step)
    names = ("trunk", "depth", "layer", "type", "call", "signal", "statistic")
    keys = zip(*(map(str, table[n].tolist()) for n in names), strict=True)
    values = zip(table["value"].tolist(), table["status"].tolist(), strict=True)
    return dict(zip(keys, values, strict=True))


def same_as_alone(record: gradscope.Record, single: gradscope.Record, loose: float = 1e-9) -> None:
    assert [s.step for s in record.steps] == [s.step for s in single.steps]
    for ours, theirs in zip(record.steps, single.steps, strict=True):
        found, expected = keyed(record, ours.step), keyed(single, theirs.step)
        assert list(found) == list(expected)
        for key, (value, status) in expected.items():
            got, why = found[key]
            if key[-1] == "sample_dot" and status == "ok":
                assert why == "local"  # samples of different ranks would have to meet
                continue
            assert why == status, (ours.step, key, why, status)
            if status == "ok":
                assert got == pytest.approx(value, rel=loose, abs=1e-14), (ours.step, key)


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_layers(ranks: dict[str, list[Any]], name: str) -> None:
    single = train(frozen(net()), batches(), optimizers=trained)
    assert "frozen" in set(single.table(step=0)["status"].tolist())
    for record in both(ranks, name):
        same_as_alone(record, single)


@pytest.mark.parametrize("name", [*PLAIN, *OTHERS])
def test_both_ranks_record_what_one_process_records(ranks: dict[str, list[Any]], name: str) -> None:
    single = alone(**OTHERS[name][1]) if name in OTHERS else alone()
    for record in both(ranks, name):
        same_as_alone(record, single)


def truth(step: int) -> Expected:
    """Autograd on an unwatched copy, in float64 and on the whole batch, after so many steps."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for batch in batches()[:step]:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    inputs = {"blocks.0": "blocks.0"}
    return expected_values(model, batches()[step], loss_of, callable_layers(model), inputs)


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
@pytest.mark.parametrize("step", [0, 1, 2])
def test_the_values_are_those_of_autograd_on_the_whole_batch(
    ranks: dict[str, list[Any]], name: str, step: int
) -> None:
    expected = truth(step)
    record = both(ranks, name)[1]
    assert record.steps[step].loss == pytest.approx(expected.loss, rel=1e-12)
    checked = 0
    for key, (value, status) in keyed(record, step).items():
        layer, kind, call, signal, statistic = key[2], key[3], int(key[4]), key[5], key[6]
        if kind == "Parameter":
            gradient = expected.parameter_gradient[layer]
            if (signal, statistic) in (("param_grad", "l2"), ("param_grad", "l2_at_step")):
                if status == "not sampled":
                    continue
                assert value == pytest.approx(float(gradient.norm()), rel=1e-10)
                checked += 1
            continue
        row = layer, -1 if kind == "Stream" else call, signal, statistic
        if status == "ok" and row in expected.values:
            assert value == pytest.approx(expected.values[row], abs=1e-9 * expected.scale[row]), key
            checked += 1
    assert checked > 150


def test_the_header_says_over_how_many_ranks(ranks: dict[str, list[Any]]) -> None:
    assert both(ranks, "ddp")[0].header["parallelism"] == "DDP, 2 ranks"
    assert both(ranks, "fsdp")[1].header["parallelism"] == "FSDP2, 2 ranks"
    assert both(ranks, "fsdp")[1].header["model"] == "Net"


def test_the_parts_differ(ranks: dict[str, list[Any]]) -> None:
    # Else the tests above would not tell a rank's values from those of both.
    x = batches()[0][0]
    assert np.isclose(x[: BATCH // 2].std() / x[BATCH // 2 :].std(), 3, rtol=0.2)
