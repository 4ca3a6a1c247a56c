"""All that counts a model's layers and parameters: made anew when the model changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from gradscope.collect.accumulation import Accumulation
from gradscope.collect.assembly import Assembler
from gradscope.collect.optimizers import Optimizers
from gradscope.collect.parameters import Parameters
from gradscope.collect.sampling import Sampler
from gradscope.collect.schedule import Schedule
from gradscope.collect.setting import compiled_sites, linear_sites, scripted_sites
from gradscope.collect.structure import Structure
from gradscope.collect.traced import Traced
from gradscope.layers import Layer

if TYPE_CHECKING:
    from gradscope.collect.recorder import Recorder

__all__ = ["Options", "Parts"]


class Options(NamedTuple):
    """What was asked of a watch, for when its layers are looked for again."""

    wanted: frozenset[str]
    update: bool
    scaler: Any
    input_gradient: bool


@dataclass(slots=True, eq=False)
class Parts:
    """The parts of a recorder that know layers by their numbers; none of them holds a module.

    Attributes:
        layers: the watched layers.
        structure: what the model was made of.
        assembler: makes rows of samples.
        sampler: makes samples of what hooks see.
        accumulation: whether backward passes add up.
        optimizers: what optimizers do to the parameters.
        traced: what hooks measure inside of compiled graphs.
    """

    layers: tuple[Layer, ...]
    structure: Structure
    assembler: Assembler
    sampler: Sampler
    accumulation: Accumulation
    optimizers: Optimizers
    traced: Traced

    @classmethod
    def of(
        cls,
        recorder: Recorder,
        model: nn.Module,
        selected: Sequence[tuple[Layer, nn.Module]],
        options: Options,
        schedule: Schedule,
    ) -> Parts:
        """Those of a model as it is now."""
        layers = tuple(layer for layer, _ in selected)
        parameters = Parameters(model)
        assembler = Assembler(
            layers=layers,
            trunks=tuple(dict.fromkeys(x.trunk for x in layers if x.is_block)),
            parameters=parameters,
            wanted=options.wanted,
            update=options.update,
            cadence=schedule,
            compiled=compiled_sites(model, layers),
            scripted=scripted_sites([module for _, module in selected]),
        )
        sampler = Sampler(
            recorder,
            layers,
            assembler.trunks,
            linear=linear_sites([module for _, module in selected]),
            wanted=options.wanted,
            input_gradient=options.input_gradient,
        )
        assembler.verified, assembler.added = sampler.verified, sampler.added
        return cls(
            layers=layers,
            structure=Structure(model),
            assembler=assembler,
            sampler=sampler,
            accumulation=Accumulation(parameters),
            optimizers=Optimizers(parameters, scaler=options.scaler, update=options.update),
            traced=Traced(layers, assembler.trunks),
        )

    def take_over(self, before: Parts) -> None:
        """Keep what the parts of the model as it was before have seen of the run."""
        before.traced.stop()
        self.assembler.reached = before.assembler.reached
        self.sampler.dtypes |= before.sampler.dtypes | before.traced.dtypes
        self.sampler.autocast_dtypes |= before.sampler.autocast_dtypes
        self.optimizers.seen = before.optimizers.seen
