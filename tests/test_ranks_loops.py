"""Across ranks: precision, scalers, explicit steps, files, meshes; the training notices nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_processes import (
    STEPS,
    Net,
    alone,
    batches,
    loss_of,
    net,
    run,
    sgd,
    share,
    train,
)
from test_ranks import data, keyed, same_as_alone
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

import gradscope


def half_hook(rank: int) -> gradscope.Record:
    model = DDP(net())
    model.register_comm_hook(None, fp16_compress_hook)
    return train(model, data(rank))


def autocast_loss(model: Any, batch: Any) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return loss_of(model, batch)


def autocast(rank: int) -> gradscope.Record:
    model = DDP(net(torch.float32))
    return train(model, [share(b, rank) for b in batches(torch.float32)], loss=autocast_loss)


def mixed_fsdp(rank: int) -> gradscope.Record:
    model: Any = net(torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    return train(model, [share(b, rank) for b in batches(torch.float32)], loss=mixed_loss)


def mixed_loss(model: Any, batch: Any) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]).float(), batch[1])


def scaled(model: Any, data: list[Any]) -> gradscope.Record:
    """In step 1 the gradients overflow."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = sgd(model)
    with gradscope.watch(model, warn=False, slow_every=2) as scope:
        for n, batch in enumerate(data):
            if n == 1:
                batch = (batch[0], batch[1] * 1e308)
            scaler.scale(loss_of(model, batch)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    return scope.record


def said_steps(model: Any, data: list[Any]) -> gradscope.Record:
    """An update by hand, and ``scope.step()``."""
    with gradscope.watch(model, warn=False, slow_every=2) as scope:
        for batch in data:
            loss = loss_of(model, batch)
            loss.backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad
                    p.grad = None
            scope.step(loss=loss)
    return scope.record


def file_of(rank: int) -> tuple[list[gradscope.Record], list[bool]]:
    """Both ranks are given one path, and a second run continues it."""
    box = [None if rank else str(Path.cwd() / "r.jsonl")]
    dist.broadcast_object_list(box, 0)
    found = [train(DDP(net()), data(rank), path=box[0]) for _ in range(2)]
    dist.barrier()
    assert box[0] is not None
    return [*found, gradscope.Record.load(box[0])], []


def replicated_shards(rank: int) -> gradscope.Record:
    """HSDP: two replicas of one shard each."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    model: Any = fully_shard(net(), mesh=mesh)
    return train(model, data(rank))


def tensor_parallel(rank: int) -> gradscope.Record:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = net()
    mesh = init_device_mesh("cpu", (2,))
    for block in model.blocks:
        parallelize_module(block, mesh, {"mlp.0": ColwiseParallel(), "mlp.2": RowwiseParallel()})
    return train(model, batches())


def first_fsdp(rank: int) -> gradscope.Record:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(net(), use_orig_params=True, device_id=torch.device("cpu"))
    return train(model, data(rank))


def pipeline(rank: int) -> Any:
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    class Half(nn.Module):
        def __init__(self, whole: Net) -> None:
            super().__init__()
            self.first = whole.stem if rank == 0 else nn.Identity()
            self.blocks = whole.blocks[:2] if rank == 0 else whole.blocks[2:]
            self.last = whole.head if rank else nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            for block in self.blocks:
                x = block(x)
            return self.last(x)

    model = Half(net())
    stage = PipelineStage(model, rank, 2, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, 2, loss_fn=nn.functional.mse_loss)
    optimizer = sgd(model)
    layers = "blocks.*"
    with gradscope.watch(model, layers, warn=False) as scope:
        for x, y in batches():
            if rank == 0:
                schedule.step(x)
            else:
                schedule.step(target=y)
            optimizer.step()
            optimizer.zero_grad()
    return scope.record


class Counted:
    """Counts the collectives of a group, and notes whether a backward pass was running."""

    def __init__(self, group: Any, calls: list[int]) -> None:
        self.group, self.calls = group, calls

    def __getattr__(self, name: str) -> Any:
        plain = getattr(self.group, name)

        def call(*args: Any) -> Any:
            self.calls.append(torch._C._current_graph_task_id())
            return plain(*args)

        return call


def counted(rank: int) -> Any:
    """The collectives of gradscope's own group in a forward, a backward, and an optimizer's step."""
    from gradscope.collect.ranks import Ranks

    calls: list[int] = []
    plain = Ranks._make_group
    Ranks._make_group = lambda self, store: Counted(plain(self, store), calls)  # type: ignore
    try:
        model = DDP(net())
        optimizer = sgd(model)
        seen: list[tuple[int, int, int]] = []
        with gradscope.watch(model, every=2, warn=False):
            for batch in data(rank) * 2:
                before = len(calls)
                loss = loss_of(model, batch)
                forward = len(calls)
                loss.backward()
                backward = len(calls)
                optimizer.step()
                optimizer.zero_grad()
                seen.append((forward - before, backward - forward, len(calls) - backward))
        return seen, calls
    finally:
        Ranks._make_group = plain


def trained(rank: int, *, watched: bool, sharded: bool) -> list[Tensor]:
    model: Any = net(torch.float32)
    model = fully_shard(model) if sharded else DDP(model)
    optimizer = sgd(model)
    scope = gradscope.watch(model, warn=False, slow_every=2) if watched else None
    losses: list[Tensor] = []
    for batch in batches(torch.float32):
        loss = loss_of(model, share(batch, rank))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    if scope is not None:
        scope.close()
    whole = [p.full_tensor() if sharded else p.data for p in model.parameters()]
    return [*losses, *(p.detach() for p in whole)]


def same_bits(rank: int) -> list[bool]:
    found: list[bool] = []
    for sharded in (False, True):
        plain, seen = (trained(rank, watched=w, sharded=sharded) for w in (False, True))
        found += [torch.equal(a, b) for a, b in zip(plain, seen, strict=True)]
    return found


def compiled(rank: int) -> gradscope.Record:
    return train(DDP(torch.compile(net(), backend="aot_eager")), data(rank))  # type: ignore


def measured(rank: int) -> Any:
    return gradscope.measure(net(), share(batches()[0], rank), loss_of)


def scaled_ranks(rank: int) -> gradscope.Record:
    return scaled(DDP(net()), data(rank))


def said_ranks(rank: int) -> gradscope.Record:
    return said_steps(DDP(net()), data(rank))


CASES = {
    "half hook": half_hook,
    "autocast": autocast,
    "mixed fsdp": mixed_fsdp,
    "scaled": scaled_ranks,
    "said": said_ranks,
    "file": file_of,
    "hsdp": replicated_shards,
    "tensor parallel": tensor_parallel,
    "fsdp 1": first_fsdp,
    "pipeline": pipeline,
    "counted": counted,
    "same bits": same_bits,
    "measured": measured,
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    tmp = tmp_path_factory.mktemp("loops")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp)
        return run(CASES, tmp, seconds=240)


def both(ranks: dict[str, list[Any]], name: str) -> list[Any]:
    for found in ranks[name]:
        assert not isinstance(found, str), found
    return ranks[name]


def test_a_compressed_reduction(ranks: dict[str, list[Any]]) -> None:
    single = alone()
    for record, _ in both(ranks, "half hook"):
        found, expected = keyed(record, 0), keyed(single, 0)
        for key, (value, status) in found.items():
            if key[5:] == ("param_grad", "l2"):
                # float16 keeps 11 bits of each element.
                assert (status, value) == ("ok", pytest.approx(expected[key][0], rel=2**-9)), key
            elif status == "ok" and key[5] == "output_grad":
                assert value == pytest.approx(expected[key][0], rel=1e-9, abs=1e-14), key


@pytest.mark.parametrize("name", ["autocast", "mixed fsdp"])
def test_mixed_precision(ranks: dict[str, list[Any]], name: str) -> None:
    # The truth is float64's, so far as bfloat16 lets it be.
    single = alone()
    for record, said in both(ranks, name):
        assert said == []
        found, expected = keyed(record, 0), keyed(single, 0)
        checked = 0
        for key, (value, status) in found.items():
            if key[6] in ("l2", "count", "tokens", "absmax"):
                assert status == expected[key][1], key
                if status == "ok":
                    assert value == pytest.approx(expected[key][0], rel=0.06), key
                    checked += 1
        assert checked > 100


def test_scaled_losses_and_a_skipped_step(ranks: dict[str, list[Any]]) -> None:
    single = scaled(net(), batches())
    assert "skipped step" in set(single.table(step=1)["status"].tolist())
    for record, _ in both(ranks, "scaled"):
        same_as_alone(record, single)
        assert [s.loss_scale for s in record.steps] == [s.loss_scale for s in single.steps]


def test_steps_by_the_users_word(ranks: dict[str, list[Any]]) -> None:
    single = said_steps(net(), batches())
    for record, _ in both(ranks, "said"):
        same_as_alone(record, single)
        losses = [s.loss for s in single.steps]
        assert [s.loss for s in record.steps] == [pytest.approx(x, rel=1e-12) for x in losses]


def test_one_rank_writes_the_file_that_all_were_given(ranks: dict[str, list[Any]]) -> None:
    single = alone()
    for (first, second, loaded), _ in both(ranks, "file"):
        same_as_alone(first, single)
        assert [s.step for s in second.steps] == [STEPS, STEPS + 1, STEPS + 2]
        assert [s.step for s in loaded.steps] == list(range(2 * STEPS))
        assert all("local" not in str(k) for k in loaded.header.values())


def test_shards_and_replicas(ranks: dict[str, list[Any]]) -> None:
    single = alone()
    for record, said in both(ranks, "hsdp"):
        assert said == []
        same_as_alone(record, single)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("tensor parallel", "tensor parallel"),
        ("fsdp 1", "FSDP1"),
        ("pipeline", "pipeline parallel"),
    ],
)
def test_what_is_not_pooled_is_local(ranks: dict[str, list[Any]], name: str, kind: str) -> None:
    for record, said in both(ranks, name):
        assert record.steps
        for step in record.steps:
            assert set(record.table(step=step.step)["status"].tolist()) == {"local"}
        assert record.header["parallelism"] == f"{kind}, 2 ranks, local values"
        assert len([s for s in said if "marks them 'local'" in s]) == 1


def test_two_collectives_per_recorded_step_and_none_in_a_pass(ranks: dict[str, list[Any]]) -> None:
    for seen, calls in both(ranks, "counted"):
        assert seen == [(0, 0, 2), (0, 0, 0)] * STEPS
        assert set(calls) == {-1}


def test_the_training_notices_nothing(ranks: dict[str, list[Any]]) -> None:
    for found in both(ranks, "same bits"):
        assert len(found) > 60
        assert all(found)


@pytest.mark.slow
def test_a_compiled_model_under_ddp(tmp_path: Path) -> None:
    ranks = run({"compiled": compiled}, tmp_path, seconds=240)
    single = train(torch.compile(net(), backend="aot_eager"), batches())  # type: ignore
    for record, _ in both(ranks, "compiled"):
        same_as_alone(record, single)


def test_an_experiment_is_its_own_process(ranks: dict[str, list[Any]]) -> None:
    for rank, (record, _) in enumerate(both(ranks, "measured")):
        expected = keyed(gradscope.measure(net(), share(batches()[0], rank), loss_of), 0)
        found = keyed(record, 0)
        assert found.keys() == expected.keys()
        for key, (value, status) in found.items():
            assert status == expected[key][1] != "local"
            assert value == pytest.approx(expected[key][0], rel=1e-12, nan_ok=True)
