"""One replicate of a model as a gradient baseline sees it: a measured step, checksums and exact facts."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from gradscope.collect.parameters import Parameters
from gradscope.collect.tensors import tensors_in
from gradscope.errors import MeasureError
from gradscope.experiment.architecture import architecture
from gradscope.experiment.batches import model_loss, own_random_state
from gradscope.experiment.checksum import checksum
from gradscope.experiment.measure import measure
from gradscope.layers import named_layers, select
from gradscope.record import Record, Step

__all__ = ["ParameterFacts", "Replicate", "Replicates", "initial_facts", "joined", "kinds_of_skip"]

Loss = Callable[[nn.Module, Any], Tensor]

#: The statistics that features and facts are read from.
_STATISTICS: Final = (
    *("l2", "count", "nonfinite", "token_variance", "dot_next", "diff_next_l2"),
    *("query_l2", "key_l2", "value_l2"),
)


#: Seconds below which a replicate does not tell how busy the machine is.
_TELLING: Final = 0.05


@dataclass(slots=True)
class ParameterFacts:
    """What is exactly known of one parameter.

    Attributes:
        shape: its shape.
        requires_grad: whether it is trained.
        constant: whether all elements are equal, as in a norm's weight; False where no checksum was
            asked for.
        checksum: of its values; NaN for zeros, and where none was asked for.
        zero_rows: share of its gradient's rows (along the first axis) that are exactly zero; NaN without
            a gradient.
    """

    shape: tuple[int, ...]
    requires_grad: bool
    constant: bool
    checksum: float
    zero_rows: float = math.nan


@dataclass(slots=True)
class Replicate:
    """One seed, or one batch.

    Attributes:
        seed: the seed, or the number of the batch.
        record: the measured step.
        parameters: by name, in the order of definition.
        activation: checksum of each block's output; a trunk's input stands under ``input of ...``. Empty
            where no checksums were asked for.
        output_grad: the same of the gradient there.
        random: digest of the random state that the forward pass begins with; "" where it draws nothing.
    """

    seed: int
    record: Record
    parameters: dict[str, ParameterFacts]
    activation: dict[str, float]
    output_grad: dict[str, float]
    random: str | None = None


class Replicates:
    """Makes replicates of one model on demand.

    On a machine so busy that several threads get less than one processor, all but the first replicate run
    with one thread.

    Args:
        make_model: returns a new model; or a model, which is copied.
        batch: what ``loss`` takes; ``run`` may give another.
        loss: ``loss(model, batch)`` → scalar tensor; None for ``model(**batch).loss``.
    """

    def __init__(
        self, make_model: Callable[[], nn.Module] | nn.Module, batch: Any, loss: Loss | None
    ) -> None:
        self._make = make_model
        self._batch = batch
        self._loss = loss or model_loss
        self._last: nn.Module | None = None
        self._crowded = False

    def run(self, seed: int, batch: Any = None, *, checksums: bool = True) -> Replicate:
        """One forward and backward under that seed.

        Args:
            seed: the seed, or the number of the batch.
            batch: another batch than the one given at first.
            checksums: whether to take them; a replicate that no other has the weights of needs none.

        Raises:
            MeasureError: see `gradscope.measure`.
        """
        threads = torch.get_num_threads()
        wall, used = time.perf_counter(), time.process_time()
        if self._crowded:
            torch.set_num_threads(1)
        try:
            found = self._run(seed, batch, checksums)
        finally:
            if self._crowded:
                torch.set_num_threads(threads)
        wall, used = time.perf_counter() - wall, time.process_time() - used
        # Threads that wait for each other on a busy machine take several times as long as one alone.
        self._crowded = self._crowded or (threads > 1 and wall > _TELLING and used < wall)
        return found

    def _run(self, seed: int, batch: Any, checksums: bool) -> Replicate:
        found = Replicate(seed, Record({}), {}, {}, {})
        batch = self._batch if batch is None else batch

        def loss(model: nn.Module, data: Any) -> Tensor:
            before = _random_state()
            with _Listening(model, found, checksums):
                value = self._loss(model, data)
            if found.random is None:
                found.random = before if _random_state() != before else ""
            return value

        given = self._make
        if isinstance(given, nn.Module):
            found.record = measure(given, [batch], loss, 1, seed=seed, statistics=_STATISTICS)
            return found

        def make() -> nn.Module:
            model = given()
            if model is self._last:
                raise MeasureError(
                    "make_model() returned the same model twice: its replicates would be one and the "
                    "same. Make a new model in it (lambda: Model(...)), or give the model itself and "
                    "several batches."
                )
            self._last = model
            return model

        found.record = measure(make, batch, loss, 1, seed=seed, statistics=_STATISTICS)
        return found

    def model(self, seed: int) -> nn.Module:
        """The model of that seed, for experiments that run it themselves."""
        if isinstance(self._make, nn.Module):
            return self._make
        with own_random_state():
            torch.manual_seed(seed)
            return self._make()


def _random_state() -> str:
    state = hashlib.sha256(torch.get_rng_state().numpy().tobytes())
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state.update(torch.cuda.get_rng_state().numpy().tobytes())
    return state.hexdigest()[:8]


class _Listening:
    """Hooks that take exact facts and checksums, for one forward and the backward pass after it."""

    def __init__(self, model: nn.Module, found: Replicate, checksums: bool) -> None:
        self._model = model
        self._found = found
        self._checksums = checksums
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        model, found = self._model, self._found
        for name, parameter in _parameters(model):
            facts = found.parameters[name] = _facts(parameter, self._checksums)
            if parameter.requires_grad:
                # Goes with its model: a replicate's model is dropped after its step.
                parameter.register_post_accumulate_grad_hook(_ZeroRows(facts))
        if not self._checksums:
            return
        modules = named_layers(model)
        first: set[str] = set()
        for layer, module in select(model, None):
            if not layer.is_block:
                continue
            if layer.trunk not in first:
                first.add(layer.trunk)
                entry = modules[layer.parts[0]] if layer.parts else module
                self._handles.append(
                    entry.register_forward_pre_hook(_Input(found, layer.name), with_kwargs=True)
                )
            self._handles.append(module.register_forward_hook(_Output(found, layer.name)))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


class _ZeroRows:
    def __init__(self, facts: ParameterFacts) -> None:
        self._facts = facts

    def __call__(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        if gradient is None or gradient.is_sparse or not gradient.numel():
            return
        rows = gradient.reshape(len(gradient), -1) if gradient.dim() else gradient.reshape(1, 1)
        begins = (rows[:, 0] == 0).nonzero().squeeze(1)  # hardly any row does: the rest is not read
        zeros = int((rows[begins] == 0).all(1).sum()) if len(begins) else 0
        self._facts.zero_rows = zeros / len(rows)


class _Output:
    def __init__(self, found: Replicate, name: str) -> None:
        self._found = found
        self._name = name
        self._calls = 0

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        name = f"{self._name} call {self._calls}" if self._calls else self._name
        self._calls += 1
        _take(self._found, name, output)


class _Input:
    def __init__(self, found: Replicate, name: str) -> None:
        self._found = found
        self._name = f"input of {name}"

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._name not in self._found.activation:
            _take(self._found, self._name, (args, kwargs))


def _take(found: Replicate, name: str, value: Any) -> None:
    tensor = next(iter(tensors_in(value)), None)
    if tensor is None or not torch.is_grad_enabled():
        return
    found.activation[name] = checksum(tensor)
    if tensor.requires_grad:
        tensor.register_hook(_Gradient(found, name))


class _Gradient:
    def __init__(self, found: Replicate, name: str) -> None:
        self._found = found
        self._name = name

    def __call__(self, gradient: Tensor) -> None:
        self._found.output_grad[self._name] = checksum(gradient)


def initial_facts(model: nn.Module) -> dict[str, ParameterFacts]:
    """What is known of each parameter of a model before it runs."""
    return {name: _facts(parameter, True) for name, parameter in _parameters(model)}


def _parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for entry in Parameters(model).entries:
        parameter = entry.tensor()
        if parameter is not None:
            yield entry.name, parameter


def _facts(parameter: Tensor, checksums: bool) -> ParameterFacts:
    shape = tuple(parameter.shape)
    if not checksums:
        return ParameterFacts(shape, parameter.requires_grad, False, math.nan)
    values = parameter.detach().reshape(-1)
    # Two elements tell nearly every tensor that is not constant.
    constant = not len(values) or (bool(values[0] == values[-1]) and bool((values == values[0]).all()))
    return ParameterFacts(shape, parameter.requires_grad, constant, checksum(values))


def joined(replicates: Iterable[Replicate]) -> Record:
    """One Record of several replicates, numbered from 0."""
    found = list(replicates)
    steps: list[Step] = []
    for number, item in enumerate(found):
        steps += [replace(step, replicate=number) for step in item.record.steps]
    seeds = {"first": found[0].seed, "replicates": len(found)}
    return Record({**found[-1].record.header, "seeds": seeds}, tuple(steps))


def kinds_of_skip(model: nn.Module, batch: Any, loss: Loss | None) -> Mapping[str, str]:
    """For each block, the kind of skip and norm of its sublayers, as `gradscope.architecture` proves it.

    Raises:
        MeasureError: it cannot be read off this model.
    """
    table: dict[str, list[str]] = {}
    for sublayer in architecture(model, batch, loss).sublayers:
        name = f"{sublayer.block} call {sublayer.call}" if sublayer.call else sublayer.block
        if sublayer.status != "ok":
            words = "unproved"
        elif not sublayer.skip:
            words = "no skip"
        else:
            own = sublayer.norm not in ("", sublayer.kind)
            words = f"{sublayer.kind} ({sublayer.norm})" if own else sublayer.kind
        table.setdefault(name, []).append(words)
    return {name: ", ".join(words) for name, words in table.items()}
