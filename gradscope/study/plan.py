"""What the study runs: plans, and the units of work they consist of.

A unit is the smallest piece that is kept: one variant at one depth under one initialisation over
all seeds, or one training run. It holds everything that its numbers depend on, apart from the
text and the code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

__all__ = ["PLANS", "InitialisationUnit", "Plan", "TrainingUnit", "Unit"]


@dataclass(frozen=True, kw_only=True)
class InitialisationUnit:
    """One variant at initialisation: `seeds` fresh models of one depth, measured in float64.

    Attributes:
        variant: a name in `gradscope.reference.VARIANTS`.
        initialization: how the weights are drawn.
        depth: number of blocks.
        seeds: number of models; model r is built under seed r.
        effective_depth: whether the effective depth D is measured too.
        width: features of the stream.
        heads: attention heads.
        context: tokens of a sequence.
        batch: sequences.
    """

    variant: str
    initialization: str
    depth: int
    seeds: int
    effective_depth: bool
    width: int
    heads: int
    context: int
    batch: int

    @property
    def slug(self) -> str:
        """The name of the unit's files."""
        return f"initialisation-{self.variant}-{self.initialization}-depth{self.depth}"

    @property
    def title(self) -> str:
        """The unit in words, for the progress display."""
        return f"{self.variant}, {self.depth} blocks, {self.initialization} initialisation"

    @property
    def work(self) -> float:
        """Expected cost in block passes of 1,000 tokens of a watched float32 training step."""
        # Measured: float64, every statistic, a fresh model per seed; D takes two more passes.
        passes = 6.7 + 5.0 * self.effective_depth
        return passes * self.seeds * self.depth * self.batch * self.context / 1000


@dataclass(frozen=True, kw_only=True)
class TrainingUnit:
    """One training run, watched.

    Attributes:
        variant: a name in `gradscope.reference.VARIANTS`.
        depth: number of blocks.
        learning_rate: AdamW's, after the warm-up.
        seed: of the weights and of the order of the data.
        steps: optimizer steps.
        warmup_steps: steps over which the learning rate rises linearly.
        width: features of the stream.
        heads: attention heads.
        context: tokens of a sequence.
        batch: sequences per step.
        evaluate_every: steps between two validation losses.
        validation_windows: sequences of the validation set.
        watch_every: steps between two recorded steps.
    """

    variant: str
    depth: int
    learning_rate: float
    seed: int
    steps: int
    warmup_steps: int
    width: int
    heads: int
    context: int
    batch: int
    evaluate_every: int
    validation_windows: int
    watch_every: int

    @property
    def slug(self) -> str:
        """The name of the unit's files."""
        return f"training-{self.variant}-depth{self.depth}-rate{self.learning_rate:g}-seed{self.seed}"

    @property
    def title(self) -> str:
        """The unit in words, for the progress display."""
        return (
            f"training {self.variant}, {self.depth} blocks, rate {self.learning_rate:g}, seed {self.seed}"
        )

    @property
    def work(self) -> float:
        """Expected cost in block passes of 1,000 tokens of a watched training step."""
        evaluations = self.steps // self.evaluate_every + 1
        tokens = self.steps * self.batch + evaluations * self.validation_windows / 3
        return self.depth * tokens * self.context / 1000


Unit = InitialisationUnit | TrainingUnit


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that the study's numbers depend on, apart from the text and the code.

    Attributes:
        name: of the plan.
        width: features of the stream.
        heads: attention heads.
        context: tokens of a sequence.
        variants: those measured at torch's default initialisation.
        depths: numbers of blocks, at initialisation.
        seeds: models per variant and depth, at initialisation.
        initializations: further initialisations, measured for `initialization_variants`.
        initialization_variants: the variants of the initialisation table.
        measure_batch: sequences of the batch at initialisation.
        training_variants: those trained.
        training_depths: numbers of blocks, in training.
        learning_rates: rates tried by a variant, ascending; `other_rates` for those not named.
        other_rates: rates tried by all other variants, ascending.
        rate_seeds: runs at every learning rate (seeds 0, 1, ...).
        best_seeds: runs at each variant's best learning rate, those of `rate_seeds` among them.
        steps: optimizer steps of a run.
        warmup_steps: steps of linear warm-up.
        batch: sequences per training step.
        evaluate_every: steps between two validation losses.
        validation_windows: sequences of the validation set.
        watch_every: steps between two recorded steps.
        robustness: whether enough was trained (every rate with every seed, up to deep nets) to
            compare the robustness of variants.
    """

    name: str
    width: int = 64
    heads: int = 4
    context: int = 64
    variants: tuple[str, ...]
    depths: tuple[int, ...]
    seeds: int = 5
    initializations: tuple[str, ...] = ("xavier", "normal", "he")
    initialization_variants: tuple[str, ...] = ("no_skip", "no_skip_pre_norm", "pre_norm")
    measure_batch: int = 3
    training_variants: tuple[str, ...]
    training_depths: tuple[int, ...]
    learning_rates: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    other_rates: tuple[float, ...]
    rate_seeds: int = 1
    best_seeds: int = 3
    steps: int
    warmup_steps: int
    batch: int = 6
    evaluate_every: int
    validation_windows: int
    watch_every: int
    robustness: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "learning_rates", MappingProxyType(dict(self.learning_rates)))

    def rates(self, variant: str) -> tuple[float, ...]:
        """The learning rates that a variant tries, ascending."""
        return self.learning_rates.get(variant, self.other_rates)

    @property
    def initialisation_units(self) -> tuple[InitialisationUnit, ...]:
        """The units at initialisation, the deepest (longest) first."""
        pairs = [(v, "torch") for v in self.variants]
        pairs += [(v, i) for i in self.initializations for v in self.initialization_variants]
        return tuple(
            InitialisationUnit(
                variant=variant,
                initialization=initialization,
                depth=depth,
                seeds=self.seeds,
                effective_depth=initialization == "torch",
                width=self.width,
                heads=self.heads,
                context=self.context,
                batch=self.measure_batch,
            )
            for depth in sorted(self.depths, reverse=True)
            for variant, initialization in pairs
        )

    def training_unit(self, variant: str, depth: int, rate: float, seed: int) -> TrainingUnit:
        """The training run of a variant at a depth, a learning rate and a seed."""
        return TrainingUnit(
            variant=variant,
            depth=depth,
            learning_rate=rate,
            seed=seed,
            steps=self.steps,
            warmup_steps=self.warmup_steps,
            width=self.width,
            heads=self.heads,
            context=self.context,
            batch=self.batch,
            evaluate_every=self.evaluate_every,
            validation_windows=self.validation_windows,
            watch_every=self.watch_every,
        )

    def rate_units(self, variant: str, depth: int) -> tuple[TrainingUnit, ...]:
        """The runs that decide a variant's best learning rate at a depth."""
        return tuple(
            self.training_unit(variant, depth, rate, seed)
            for rate in self.rates(variant)
            for seed in range(self.rate_seeds)
        )

    def best_rate(self, variant: str, depth: int, losses: Mapping[Unit, float]) -> float | None:
        """The learning rate with the lowest mean final validation loss over the `rate_seeds`.

        A run that diverged counts as infinite loss; of equal rates the smaller wins. None until all
        `rate_units` have a loss.
        """
        units = self.rate_units(variant, depth)
        if any(unit not in losses for unit in units):
            return None

        def mean_loss(rate: float) -> float:
            values = [losses[unit] for unit in units if unit.learning_rate == rate]
            mean = sum(values) / len(values)
            return mean if mean == mean else float("inf")

        return min(self.rates(variant), key=lambda rate: (mean_loss(rate), rate))

    def best_units(self, variant: str, depth: int, rate: float) -> tuple[TrainingUnit, ...]:
        """All runs at a variant's best learning rate, one per seed."""
        seeds = max(self.best_seeds, self.rate_seeds)
        return tuple(self.training_unit(variant, depth, rate, seed) for seed in range(seeds))

    def units(self, losses: Mapping[Unit, float]) -> tuple[Unit, ...]:
        """Every unit that is known to be needed, in the order in which to run them.

        The runs at the best rates become known only when the rates of that variant are decided,
        so these stand before the short units at initialisation, which fill the rest.

        Args:
            losses: final validation loss of each finished training run.
        """
        pairs = [
            (v, d) for d in sorted(self.training_depths, reverse=True) for v in self.training_variants
        ]
        deciding: list[Unit] = [u for v, d in pairs for u in self.rate_units(v, d)]
        best: list[Unit] = []
        for variant, depth in pairs:
            rate = self.best_rate(variant, depth, losses)
            if rate is not None:
                best += [u for u in self.best_units(variant, depth, rate) if u not in deciding]
        return (*deciding, *best, *self.initialisation_units)

    @property
    def total_units(self) -> int:
        """Number of units of the whole study."""
        return len(self.initialisation_units) + len(self._training_units_expected)

    @property
    def total_work(self) -> float:
        """Expected cost of the whole study, in the units of `Unit.work`."""
        units: Sequence[Unit] = (*self.initialisation_units, *self._training_units_expected)
        return sum(unit.work for unit in units)

    @property
    def _training_units_expected(self) -> tuple[TrainingUnit, ...]:
        """As many training units, of the same cost, as there will be, whichever rates are best."""
        extra = max(self.best_seeds - self.rate_seeds, 0)
        return tuple(
            unit
            for variant in self.training_variants
            for depth in self.training_depths
            for unit in (
                *self.rate_units(variant, depth),
                *self.best_units(variant, depth, self.rates(variant)[0])[:extra],
            )
        )


_SKIP_OR_NOT = ("no_skip", "no_skip_pre_norm", "skip", "pre_norm", "post_norm")
# Half a decade to each side of the best of five rates from 3e-4 to 3e-2 in a trial of the same length
# (one seed), so that no variant is judged at a rate that suits another.
_AROUND_1E_3 = (3e-4, 1e-3, 3e-3)
_AROUND_3E_3 = (1e-3, 3e-3, 1e-2)
_ALL = (
    "no_skip",
    "no_skip_pre_norm",
    "no_skip_post_norm",
    "skip",
    "pre_norm",
    "post_norm",
    "peri_norm",
    "deepnorm",
    "rezero",
    "layerscale",
    "depth_scaled",
    "layernorm_scaling",
)

#: The plans of the command: the default, ``--full``, and a tiny one that only shows that all works.
PLANS: Final[Mapping[str, Plan]] = MappingProxyType(
    {
        plan.name: plan
        for plan in (
            Plan(
                name="default",
                variants=_ALL,
                depths=(6, 12, 24, 48),
                training_variants=_SKIP_OR_NOT,
                training_depths=(12,),
                learning_rates={
                    "no_skip_pre_norm": _AROUND_3E_3,
                    "pre_norm": _AROUND_3E_3,
                },
                other_rates=_AROUND_1E_3,
                steps=80,
                warmup_steps=8,
                evaluate_every=10,
                validation_windows=24,
                watch_every=5,
            ),
            Plan(
                name="full",
                variants=_ALL,
                depths=(6, 12, 24, 48, 96),
                training_variants=(*_SKIP_OR_NOT, "peri_norm", "deepnorm", "rezero"),
                training_depths=(12, 24, 48),
                # One range for all: how much of it a variant tolerates is the question here.
                other_rates=(3e-4, 1e-3, 3e-3, 1e-2),
                rate_seeds=3,
                steps=160,
                warmup_steps=16,
                evaluate_every=20,
                validation_windows=32,
                watch_every=16,
                robustness=True,
            ),
            Plan(
                name="tiny",
                width=8,
                heads=2,
                context=16,
                variants=("no_skip", "pre_norm"),
                depths=(2, 3),
                seeds=2,
                initializations=("he",),
                initialization_variants=("no_skip", "pre_norm"),
                measure_batch=2,
                training_variants=("no_skip", "pre_norm"),
                training_depths=(2,),
                other_rates=(1e-3, 1e-2),
                best_seeds=2,
                steps=6,
                warmup_steps=2,
                batch=2,
                evaluate_every=3,
                validation_windows=4,
                watch_every=2,
            ),
        )
    }
)
