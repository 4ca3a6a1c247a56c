"""Ranks that do not do the same: nothing hangs, and what is not of the whole batch is not said to be."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_processes import BLOCKS, STEPS, alone, batches, loss_of, net, run, sgd, share, train
from test_ranks import data, keyed, same_as_alone
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import gradscope
from gradscope.collect import ranks as ranks_module


def one_watches(rank: int) -> Any:
    model = DDP(net())
    if rank == 0:
        return train(model, data(rank))
    optimizer = sgd(model)
    for batch in data(rank):
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return None


def one_reads_and_leaves(rank: int) -> Any:
    """Rank 0 reads in the middle of a step and after it, and ends its watch after two steps."""
    model = DDP(net())
    optimizer = sgd(model)
    scope = gradscope.watch(model, warn=False)
    read: list[gradscope.Record] = []
    for n, batch in enumerate(data(rank)):
        loss_of(model, batch).backward()
        if rank == 0 and n == 0:
            read.append(scope.record)
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and n == 0:
            read.append(scope.record)
        if rank == 0 and n == 1:
            scope.close()
    dist.barrier()
    scope.close()
    return [*read, scope.record]


def one_raises(rank: int) -> Any:
    """Rank 1 gives up between the backward pass and the optimizer's step."""
    model = DDP(net())
    optimizer = sgd(model)
    started = 0.0
    scope = gradscope.watch(model, warn=False)
    with contextlib.suppress(KeyError), scope:
        for n, batch in enumerate(data(rank)[:2]):
            loss_of(model, batch).backward()
            if rank == 1 and n == 1:
                raise KeyError("a bad batch")
            started = time.monotonic()
            optimizer.step()
            optimizer.zero_grad()
    waited = time.monotonic() - started
    dist.barrier()
    return scope.record, waited


def one_is_silent(rank: int) -> Any:
    """Rank 1 trains on, and does not come to the exchange of step 1."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks_module, "TIMEOUT_S", 2.0)
        if rank == 1:
            plain = ranks_module.Ranks.exchange
            patch.setattr(
                ranks_module.Ranks,
                "exchange",
                lambda self, index, *rest: None if index else plain(self, index, *rest),
            )
        return train(DDP(net()), data(rank))


def raises_at_once(rank: int) -> Any:
    """The same in the first step: no group is there yet."""
    model = DDP(net())
    optimizer = sgd(model)
    scope = gradscope.watch(model, warn=False)
    with contextlib.suppress(KeyError), scope:
        loss_of(model, data(rank)[0]).backward()
        if rank == 1:
            raise KeyError("a bad batch")
        optimizer.step()
    dist.barrier()
    return scope.record


def other_options(rank: int) -> Any:
    return train(DDP(net()), data(rank), every=1 + rank)


def other_layers(rank: int) -> gradscope.Record:
    """In step 1, rank 1 leaves a block out."""
    model = DDP(net(), find_unused_parameters=True)
    seen = 0

    def loss(ddp: Any, batch: Any) -> Any:
        nonlocal seen
        ddp.module.skip = 1 if rank == 1 and seen == 1 else None
        seen += 1
        return loss_of(ddp, batch)

    return train(model, data(rank), loss=loss)


def changed_on_one(rank: int) -> Any:
    """From step 1 on, rank 1 has a layer more."""
    model = DDP(net())
    seen = 0

    def loss(ddp: Any, batch: Any) -> Any:
        nonlocal seen
        if rank == 1 and seen == 1:
            ddp.module.blocks[0].add_module("more", nn.Identity())
        seen += 1
        return loss_of(ddp, batch)

    return train(model, data(rank), loss=loss, layers="**")


def never_reduced(rank: int) -> gradscope.Record:
    model = DDP(net())
    return train(model, data(rank), sync=lambda last: model.no_sync())


def halves(model: nn.Module) -> list[torch.optim.Optimizer]:
    weights = list(model.parameters())
    return [torch.optim.SGD(part, lr=0.1) for part in (weights[::2], weights[1::2])]


def two_optimizers(rank: int) -> gradscope.Record:
    return train(DDP(net()), data(rank), optimizers=halves)


def no_wrapper(rank: int) -> gradscope.Record:
    return train(net(), data(rank))


def joined(rank: int) -> gradscope.Record:
    """Rank 1 is out of data one step earlier."""
    model = DDP(net())
    with model.join():
        return train(model, data(rank)[: STEPS - rank])


def every_other(rank: int) -> gradscope.Record:
    return train(DDP(net()), data(rank), every=2, slow_every=1)


CASES = {
    "one watches": one_watches,
    "one reads and leaves": one_reads_and_leaves,
    "one raises": one_raises,
    "raises at once": raises_at_once,
    "one is silent": one_is_silent,
    "other options": other_options,
    "changed on one": changed_on_one,
    "other layers": other_layers,
    "never reduced": never_reduced,
    "two optimizers": two_optimizers,
    "no wrapper": no_wrapper,
    "joined": joined,
    "every other": every_other,
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    found = run(CASES, tmp_path_factory.mktemp("trouble"), seconds=240)
    for name, both in found.items():
        assert not any(isinstance(x, str) for x in both), (name, both)
    return found


def statuses(record: gradscope.Record, step: int) -> set[str]:
    """Of all rows but the parameters'."""
    table = record.table(step=step)
    return set(table["status"][table["type"] != "Parameter"].tolist())


def test_where_one_rank_watches_only_parameters_are_not_local(ranks: dict[str, list[Any]]) -> None:
    record, said = ranks["one watches"][0]
    single = alone()
    assert len(record.steps) == STEPS
    for step in range(STEPS):
        expected = keyed(single, step)
        for key, found in keyed(record, step).items():
            if key[3] == "Parameter":
                # DDP has left the whole batch's gradient on every rank.
                assert found[1] == expected[key][1]
                assert found[0] == pytest.approx(expected[key][0], rel=1e-9, nan_ok=True), key
            else:
                assert found[1] == "local"
    assert len(said) == 1 and "not every rank watches" in said[0]
    assert record.header["parallelism"] == "DDP, 2 ranks, local values"


def test_reading_on_one_rank_waits_for_nobody(ranks: dict[str, list[Any]]) -> None:
    early, late, record = ranks["one reads and leaves"][0]
    assert statuses(early, 0) == {"local"}
    same_as_alone(late, gradscope.Record(late.header, alone().steps[:1]))
    assert [s.step for s in record.steps] == [0, 1]
    (rest,) = ranks["one reads and leaves"][1]
    assert "ok" in statuses(rest, 1) and statuses(rest, 2) == {"local"}


def test_a_rank_that_raises_is_not_waited_for(ranks: dict[str, list[Any]]) -> None:
    record, waited = ranks["one raises"][0]
    assert "ok" in statuses(record, 0) and statuses(record, 1) == {"local"}
    assert waited < 20
    assert statuses(ranks["raises at once"][0][0], 0) == {"local"}


def test_a_rank_that_is_silent_is_given_up(ranks: dict[str, list[Any]]) -> None:
    record, said = ranks["one is silent"][0]
    assert "ok" in statuses(record, 0)
    assert statuses(record, 1) == statuses(record, 2) == {"local"}
    assert len(said) == 1 and "cannot pool values" in said[0]
    assert record.header["parallelism"] == "DDP, 2 ranks, local values"


def test_other_options_are_not_pooled(ranks: dict[str, list[Any]]) -> None:
    for record, said in ranks["other options"]:
        assert all(statuses(record, s.step) == {"local"} for s in record.steps)
        assert len(said) == 1 and "in the same way" in said[0]


def test_a_model_that_one_rank_has_changed_is_not_pooled(ranks: dict[str, list[Any]]) -> None:
    for record, _ in ranks["changed on one"]:
        assert statuses(record, 0) != {"local"}
        for step in range(1, STEPS):
            assert {"ok"}.isdisjoint(statuses(record, step)), step


def test_a_layer_that_ran_on_one_rank_only(ranks: dict[str, list[Any]]) -> None:
    # Autograd, with each half through its own layers: the loss is the mean of the halves'.
    model = net()
    optimizer = sgd(model)
    loss_of(model, batches()[0]).backward()
    optimizer.step()
    optimizer.zero_grad()
    outputs: dict[tuple[str, int], Any] = {}
    total: Any = 0.0
    for rank in (0, 1):
        handles = []
        for n, block in enumerate(model.blocks):

            def keep(module: Any, args: Any, output: Any, key: Any = (f"blocks.{n}", rank)) -> None:
                output.retain_grad()
                outputs[key] = output

            handles.append(block.register_forward_hook(keep))
        model.skip = 1 if rank == 1 else None
        total = total + loss_of(model, share(batches()[1], rank)) / 2
        for handle in handles:
            handle.remove()
    total.backward()
    for record, _ in ranks["other layers"]:
        found = keyed(record, 1)
        for n in range(BLOCKS):
            parts = [outputs[k] for k in ((f"blocks.{n}", 0), (f"blocks.{n}", 1)) if k in outputs]
            assert len(parts) == (1 if n == 1 else 2)
            row = ("blocks", f"{n + 1.0}", f"blocks.{n}", "Block", "0")
            whole = torch.cat([p.detach() for p in parts])
            slope = torch.cat([p.grad for p in parts])
            for signal, x in (("activation", whole), ("output_grad", slope)):
                expected = {"l2": x.norm(), "mean": x.mean(), "variance": x.var(), "count": x.numel()}
                for statistic, value in expected.items():
                    got = found[*row, signal, statistic]
                    assert got[1] == "ok" and got[0] == pytest.approx(float(value), rel=1e-9)
            # Block 0 goes on to block 1 on one rank and to block 2 on the other; of block 1 there is half
            # a batch, whose product with block 2 would stand beside the norm of all of block 2.
            pair = found[*row, "activation", "dot_next"]
            assert (pair[1] == "local") == (n in (0, 1))
        gradients = {k: p.grad.norm().item() for k, p in model.named_parameters() if p.grad is not None}
        for name, norm in gradients.items():
            (got,) = (v for k, v in found.items() if k[2] == name and k[5:] == ("param_grad", "l2"))
            assert got == (pytest.approx(norm, rel=1e-9), "ok")


def test_gradients_that_nobody_reduced_are_local(ranks: dict[str, list[Any]]) -> None:
    for record, _ in ranks["never reduced"]:
        for key, (_, status) in keyed(record, 0).items():
            if key[5:] == ("param_grad", "l2"):
                assert status == "local", key
            elif key[5:] == ("activation", "l2"):
                assert status == "ok", key


def test_two_optimizers_are_one_step(ranks: dict[str, list[Any]]) -> None:
    single = alone(optimizers=halves)
    for record, _ in ranks["two optimizers"]:
        same_as_alone(record, single)


def test_where_the_wrapper_is_unknown_all_is_local(ranks: dict[str, list[Any]]) -> None:
    for name, why in (("no wrapper", "neither in"), ("joined", "join()")):
        for record, said in ranks[name]:
            assert record.steps
            assert all(statuses(record, s.step) == {"local"} for s in record.steps)
            assert len(said) == 1 and why in said[0]


def test_only_recorded_steps_are_pooled(ranks: dict[str, list[Any]]) -> None:
    single = alone(every=2, slow_every=1)
    for record, _ in ranks["every other"]:
        same_as_alone(record, single)
