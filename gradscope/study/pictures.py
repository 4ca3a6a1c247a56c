"""The study's pictures, drawn from its Records."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from gradscope.analysis import history
from gradscope.show import plots, style
from gradscope.study.summary import AtInitialisation, InTraining, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_all"]

Floats = npt.NDArray[np.float64]

DPI: Final = 130
#: A variant goes into the lower, magnified panel if all its values stay within this factor of the
#: last layer's: there its shape can be seen, which the axis of those that vanish hides.
MAGNIFIED_FACTOR: Final = math.e**3


def draw_all(study: Study, out: Path) -> dict[str, str]:
    """Draw every picture into a folder; the caption of each by its file name."""
    import matplotlib

    matplotlib.use("agg")  # picture files need no display
    captions: dict[str, str] = {}
    for name, draw in _PICTURES.items():
        with style.context():
            figure, captions[name] = draw(study)
        _save(figure, out / name)
    return captions


def _save(figure: Figure, path: Path) -> None:
    from matplotlib import pyplot

    temporary = path.with_name(f"{path.name}.part")
    # Without the software's version in it, the same numbers give the same file.
    figure.savefig(temporary, format="png", dpi=DPI, metadata={"Software": None})
    pyplot.close(figure)
    temporary.replace(path)


def _figure(
    rows: int, columns: int, width_in: float, height_in: float, **options: Any
) -> tuple[Figure, Any]:
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=(width_in, height_in), layout="constrained", **options)


def _at_depth(study: Study, depth: int) -> dict[str, AtInitialisation]:
    """The variants at torch's initialisation and one depth, by label."""
    return {
        study.labels[v]: study.initialisation[v, "torch", depth]
        for v in study.plan.variants
        if (v, "torch", depth) in study.initialisation
    }


def _shown_depth(study: Study) -> int:
    """The depth that the profiles are shown at: the one that is trained, if it was measured."""
    trained = [d for d in study.plan.training_depths if d in study.plan.depths]
    return trained[0] if trained else min(study.plan.depths)


def depth_gradient(study: Study) -> tuple[Figure, str]:
    """Gradient flow over depth, all variants on one axis, and magnified those that keep it."""
    depth = _shown_depth(study)
    found = _at_depth(study, depth)
    figure, (whole, magnified) = _figure(2, 1, 8.6, 7.6)
    records = {label: one.record for label, one in found.items()}
    for ax in (whole, magnified):  # both draw all, so that a variant has one colour
        plots.depth(records, "grad_l2", ax=ax, normalize=True)
    whole.set_title(f"All variants at initialisation, {depth} blocks")
    magnified.set_title("The same, magnified")
    magnified.get_legend().remove()
    near = [
        one.span
        for one in found.values()
        if one.span[0] > 1 / MAGNIFIED_FACTOR and one.span[1] < MAGNIFIED_FACTOR
    ]
    if near:
        magnified.set_ylim(0.8 * min(low for low, _ in near), 1.25 * max(high for _, high in near))
        style.finish(magnified, log=True)
    return figure, (
        f"Gradient flow over depth at torch's default initialisation, {depth} blocks, relative to the "
        f"last block's output: mean of {study.plan.seeds} seeds and their range."
    )


def activation_variance(study: Study) -> tuple[Figure, str]:
    """Activation variance over depth, all variants."""
    depth = _shown_depth(study)
    records = {label: one.record for label, one in _at_depth(study, depth).items()}
    figure, ax = _figure(1, 1, 8.6, 4.2)
    plots.depth(records, "act_var", ax=ax)
    ax.set_title(f"At initialisation, {depth} blocks")
    return figure, (
        f"Activation variance of the stream over depth at torch's default initialisation, {depth} "
        f"blocks: mean of {study.plan.seeds} seeds and their range."
    )


def _over_depths(study: Study, name: str) -> dict[str, tuple[list[float], Floats]]:
    """One number per model: label → (numbers of blocks [n], values [S, n])."""
    points: dict[str, tuple[list[float], Floats]] = {}
    for variant in study.plan.variants:
        found = study.by_depth(variant)
        values = np.asarray([one.samples[name].values for one in found], dtype=np.float64).T
        points[study.labels[variant]] = ([float(one.unit.depth) for one in found], values)
    return points


def gradient_ratio(study: Study) -> tuple[Figure, str]:
    """First-to-last gradient ratio against the number of blocks, all variants."""
    figure, ax = _figure(1, 1, 8.6, 4.2)
    deltas = _over_depths(study, "delta")
    plots.ratio_against_depth({label: (x, np.exp(y)) for label, (x, y) in deltas.items()}, ax=ax)
    return figure, (
        "The gradient at the trunk's input over that at its output, against the number of blocks, at "
        f"torch's default initialisation: mean of {study.plan.seeds} seeds and their range."
    )


def effective_depth(study: Study) -> tuple[Figure, str]:
    """Effective depth against the number of blocks, all variants."""
    figure, ax = _figure(1, 1, 8.6, 4.2)
    label = "Effective depth $D$ [branches]"
    plots.against_depth(_over_depths(study, "effective_depth"), ax=ax, label=label)
    # D may be 0 or slightly negative: logarithmic above, linear below what a tenth of a branch is.
    ax.set_yscale("symlog", linthresh=0.1, linscale=0.5)
    ax.set_ylim(bottom=-0.05)
    return figure, (
        "Effective depth against the number of blocks, at torch's default initialisation: how many "
        "residual branches the gradient at the trunk's input has crossed on average, of n = 2 L. It is n "
        "without skips, by definition. No score: deeper is not better. (The axis is linear up to 0.1.)"
    )


def heatmaps(study: Study) -> tuple[Figure, str]:
    """Gradient flow over depth and steps, one map per trained variant."""
    depth = min(study.plan.training_depths)
    shown = [study.training[v, depth] for v in study.plan.training_variants]
    columns = 2
    rows = math.ceil(len(shown) / columns)
    figure, grid = _figure(rows, columns, 9.0, 2.5 * rows + 0.4, squeeze=False)
    for ax, one in zip(grid.flat, shown, strict=False):
        run = one.best[0]
        plots.heatmap(run.record, "grad_l2", ax=ax)
        ax.set_title(
            f"{one.trained.label} (learning rate {one.trained.rate:g})",
            pad=16 if _zeros(run.record) else 6,
        )
    for ax in list(grid.flat)[len(shown) :]:
        ax.set_visible(False)
    return figure, (
        f"Gradient flow during training, {depth} blocks, seed 0 at each variant's best learning rate; "
        "every map has its own colour scale."
    )


def _zeros(record: Any) -> bool:
    full = history(record, "grad_l2")
    return bool((full.ok & (full.value == 0)).any())


def loss_curves(study: Study) -> tuple[Figure, str]:
    """Validation loss over steps, each variant at its best rate."""
    depths = study.plan.training_depths
    figure, grid = _figure(len(depths), 1, 8.2, 3.8 * len(depths), squeeze=False)
    for ax, depth in zip(grid.flat, depths, strict=True):
        shown = [study.training[v, depth] for v in study.plan.training_variants]
        curves = {
            f"{one.trained.label} ({one.trained.rate:g})": (one.trained.steps, _padded(one))
            for one in shown
        }
        # As in the pictures of all variants.
        looks = [study.plan.variants.index(v) for v in study.plan.training_variants]
        plots.loss_curves(curves, ax=ax, unit="nats per byte", looks=looks)
        ax.set_ylabel("Validation loss [nats per byte]")
        _unigram_line(ax, study.unigram_nats)
        if len(depths) > 1:
            ax.set_title(f"{depth} blocks")
    return figure, (
        "Validation loss of each variant at its best learning rate (in brackets): mean of "
        f"{max(study.plan.best_seeds, study.plan.rate_seeds)} seeds and their range."
    )


def _padded(one: InTraining) -> Floats:
    """[S, n]; a run that diverged has NaN from there on."""
    length = len(one.trained.steps)
    rows = [list(v) + [math.nan] * (length - len(v)) for v in one.trained.losses.values()]
    return np.asarray(rows, dtype=np.float64)


def _unigram_line(ax: Axes, nats: float) -> None:
    ax.axhline(nats, color="0.45", linewidth=0.8, zorder=0)
    ax.annotate(
        "byte frequencies\nalone",
        (1.0, nats),
        xycoords=("axes fraction", "data"),
        xytext=(5, 0),
        textcoords="offset points",
        ha="left",
        va="center",
        fontsize=8,
        color="0.35",
    )


_PICTURES: Final[Mapping[str, Any]] = {
    "depth_gradient.png": depth_gradient,
    "activation_variance.png": activation_variance,
    "gradient_ratio.png": gradient_ratio,
    "effective_depth.png": effective_depth,
    "loss_curves.png": loss_curves,
    "heatmap.png": heatmaps,
}
