"""The variants of the residual transformer: where the skip is, where the norm is, one literal each.

Two choices are independent of each other: the skip (none, or around each sublayer) and the norm
(none, before, after, or on both sides of the sublayer's function F). With LN for layer
normalisation, one sublayer computes

=============  =====================  =====================
norm           with a skip            without a skip
=============  =====================  =====================
``none``       ``x + F(x)``           ``F(x)``
``pre``        ``x + F(LN x)``        ``F(LN x)``
``post``       ``LN(x + F(x))``       ``LN(F(x))``
``peri``       ``x + LN(F(LN x))``    ``LN(F(LN x))``
=============  =====================  =====================

A refinement (DeepNorm, a scale on each branch, LayerNorm scaling) changes one factor in one of them.
A further variant is one more literal in `VARIANTS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, TypeAlias, get_args

__all__ = [
    "LAYERSCALE_START",
    "VARIANTS",
    "BranchScale",
    "Norm",
    "Skip",
    "Variant",
    "deepnorm_constants",
]

Skip: TypeAlias = Literal["none", "sublayer"]
Norm: TypeAlias = Literal["none", "pre", "post", "peri"]
BranchScale: TypeAlias = Literal["none", "rezero", "layerscale", "depth"]

#: Start of LayerScale's diagonal. CaiT takes .1 up to depth 18, 1e-5 at 24 and 1e-6 at 36; one value
#: for all depths, between them, keeps a depth study about depth.
LAYERSCALE_START: Final = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """Where a residual transformer has its skips and norms, and what scales them.

    Attributes:
        name: the key in `VARIANTS`.
        label: how a plot names it.
        description: the sublayer's formula, and the paper it is from.
        skip: ``none``, or ``sublayer``: around the attention and around the feed-forward network.
        norm: ``none``, ``pre``, ``post`` or ``peri`` (before and after the function).
        deepnorm: LN(αx + F(x)), and β on some weights at initialisation: `deepnorm_constants`.
        branch_scale: factor on each branch: ``rezero`` (one learned scalar, starts at 0),
            ``layerscale`` (a learned diagonal, starts at `LAYERSCALE_START`), ``depth`` (the constant
            1/√(2L) with L blocks, that is 2L branches) or ``none``: no factor at all.
        layernorm_scaling: LN(h)/√l in front of the function, l ≥ 1 the number of the block.

    Raises:
        ValueError: an unknown word, or a refinement of something that the variant does not have.
    """

    name: str
    label: str
    description: str
    skip: Skip
    norm: Norm
    deepnorm: bool = False
    branch_scale: BranchScale = "none"
    layernorm_scaling: bool = False

    def __post_init__(self) -> None:
        for field, value, words in (
            ("skip", self.skip, get_args(Skip)),
            ("norm", self.norm, get_args(Norm)),
            ("branch_scale", self.branch_scale, get_args(BranchScale)),
        ):
            if value not in words:
                raise ValueError(
                    f"variant {self.name!r}: {field}={value!r} is none of {', '.join(words)}"
                )
        if self.deepnorm and (self.skip, self.norm) != ("sublayer", "post"):
            raise ValueError(
                f"variant {self.name!r}: deepnorm is LN(αx + F(x)), so it needs "
                f"skip='sublayer' and norm='post', not {self.skip!r} and {self.norm!r}"
            )
        if self.branch_scale != "none" and self.skip == "none":
            raise ValueError(
                f"variant {self.name!r}: branch_scale={self.branch_scale!r} scales a branch against "
                "its skip, and there is no skip: skip='sublayer'"
            )
        if self.layernorm_scaling and self.norm not in ("pre", "peri"):
            raise ValueError(
                f"variant {self.name!r}: layernorm_scaling divides the norm in front of the function, "
                f"and norm={self.norm!r} has none there: norm='pre'"
            )


def deepnorm_constants(blocks: int) -> tuple[float, float]:
    """DeepNorm's α = (2N)^¼ on the skip and β = (8N)^(−¼) on the weights, for N blocks.

    The values for encoder-only and decoder-only transformers (Wang et al. 2022, arXiv:2203.00555,
    table of figure 2). β multiplies the weights of the feed-forward network and of the attention's
    value and output projections at initialisation.

    >>> "{:.4f} {:.4f}".format(*deepnorm_constants(12))
    '2.2134 0.3195'
    """
    if blocks < 1:
        raise ValueError(f"DeepNorm's constants are defined for one block or more, not {blocks}")
    return (2 * blocks) ** 0.25, (8 * blocks) ** -0.25


#: The variants by name, from the plain chain to the refinements of pre-norm.
VARIANTS: Final[Mapping[str, Variant]] = MappingProxyType(
    {
        variant.name: variant
        for variant in (
            Variant(
                name="no_skip",
                label="no skip, no norm",
                description="F(x): a plain chain of sublayers.",
                skip="none",
                norm="none",
            ),
            Variant(
                name="no_skip_pre_norm",
                label="no skip, pre-norm",
                description="F(LN x). Without skips, attention collapses the tokens' rank "
                "(Dong et al. 2021, arXiv:2103.03404; Noci et al. 2022, arXiv:2206.03126).",
                skip="none",
                norm="pre",
            ),
            Variant(
                name="no_skip_post_norm",
                label="no skip, post-norm",
                description="LN(F(x)).",
                skip="none",
                norm="post",
            ),
            Variant(
                name="skip",
                label="skip, no norm",
                description="x + F(x) (He et al. 2016, arXiv:1603.05027, without its norms).",
                skip="sublayer",
                norm="none",
            ),
            Variant(
                name="pre_norm",
                label="pre-norm",
                description="x + F(LN x) (Xiong et al. 2020, arXiv:2002.04745; GPT-2, Llama).",
                skip="sublayer",
                norm="pre",
            ),
            Variant(
                name="post_norm",
                label="post-norm",
                description="LN(x + F(x)) (Vaswani et al. 2017, arXiv:1706.03762; BERT).",
                skip="sublayer",
                norm="post",
            ),
            Variant(
                name="peri_norm",
                label="peri-norm",
                description="x + LN(F(LN x)) (Peri-LN: Kim et al. 2025, arXiv:2502.02732; Gemma 2).",
                skip="sublayer",
                norm="peri",
            ),
            Variant(
                name="deepnorm",
                label="DeepNorm",
                description="LN(αx + F(x)), β on the feed-forward, value and output weights "
                "(Wang et al. 2022, arXiv:2203.00555).",
                skip="sublayer",
                norm="post",
                deepnorm=True,
            ),
            Variant(
                name="rezero",
                label="ReZero",
                description="x + αF(x), one learned α per branch, 0 at the start "
                "(Bachlechner et al. 2020, arXiv:2003.04887; SkipInit: De & Smith 2020, "
                "arXiv:2002.10444).",
                skip="sublayer",
                norm="none",
                branch_scale="rezero",
            ),
            Variant(
                name="layerscale",
                label="LayerScale",
                description="x + diag(λ)F(LN x), λ learned, 1e-4 at the start "
                "(CaiT: Touvron et al. 2021, arXiv:2103.17239).",
                skip="sublayer",
                norm="pre",
                branch_scale="layerscale",
            ),
            Variant(
                name="depth_scaled",
                label="pre-norm, branches / √(2L)",
                description="x + F(LN x)/√(2L): a constant on every branch, so that the variance of the "
                "stream does not grow with depth (as in Hayou et al. 2021, arXiv:2010.12859; GPT-2 puts "
                "the factor into the initial weights).",
                skip="sublayer",
                norm="pre",
                branch_scale="depth",
            ),
            Variant(
                name="layernorm_scaling",
                label="LayerNorm scaling",
                description="x + F(LN(x)/√l), l ≥ 1 the number of the block "
                "(Sun et al. 2025, arXiv:2502.05795).",
                skip="sublayer",
                norm="pre",
                layernorm_scaling=True,
            ),
        )
    }
)
