"""What the depth axis of an architecture must be, by its configuration and by its code."""

from __future__ import annotations

import re

import architectures
from torch import nn

__all__ = ["CODE_SAYS", "NO_AXIS", "NO_TRUNKS", "expected"]

#: The parts of a block stand at one index of several lists, and no module is a block.
NO_AXIS = ("flaubert", "xlm")

_BACKBONE = r".*stages\.\d+\.(layers|blocks)"
#: Lists as long as a count says that are no trunks, by their names, trees and counts.
NO_TRUNKS: dict[str, str] = {
    # Convolutions in front of trunks with attention.
    **dict.fromkeys(
        (
            "conditional_detr",
            "dab-detr",
            "deformable_detr",
            "detr",
            "efficientloftr",
            "rt_detr",
            "rt_detr_v2",
            "table-transformer",
            "tvp",
        ),
        _BACKBONE,
    ),
    # The same, and one head for each block.
    "d_fine": r"(?!decoder\.layers$).*",
    "deimv2": _BACKBONE + r"|.*lqe_layers",
    "omdet-turbo": _BACKBONE + r"|.*_head",
    "pp_doclayout_v3": _BACKBONE + r"|.*_head",
    "pp_doclayout_v4": _BACKBONE + r"|.*(_embed|_head\.proj)",
    "lightglue": "match_assignment_layers",
    # Cross-attentions, or downsamplings, between the blocks.
    "blt": r".*cross_attn_layers",
    "informer": r".*conv_layers",
    # Convolutions and linear layers beside trunks with attention.
    **dict.fromkeys(
        ("edgetam_video", "sam2_video", "sam3_tracker_video", "sam3_video"), r".*memory_fuser\.layers"
    ),
    **dict.fromkeys(
        ("fastspeech2_conformer_with_hifigan", "seamless_m4t", "seamless_m4t_v2"), r".*resblocks"
    ),
    "inkling_mm_model": r"vision_tower\.encoder_layers",
    "janus": r".*aligner\.hidden_layers",
    "vibevoice": r".*diffusion_head\.layers",
    # Blocks without a module of their own.
    "clvp": r"conditioning_encoder\..*",
    "evolla": r".*resampler\.layers",
    # Lists of stages.
    "clap": r".*audio_encoder\.layers",
    "muse_spark": r"audio_tower\.layers",
    "muse_spark_audio": "layers",
}


def _stages(name: str, *blocks: int) -> dict[str, int]:
    return {name.format(i): n for i, n in enumerate(blocks) if n > 1}


#: Trunks whose length no single count says, by other fields of the configuration, or the code.
CODE_SAYS: dict[str, dict[str, int]] = {
    # One layer, called num_hidden_layers times.
    "albert": {"encoder.albert_layer_groups.0.albert_layers": 1},
    "clap": _stages("audio_model.audio_encoder.layers.{}.blocks", 2, 2, 6, 2),
    "cvt": _stages("encoder.stages.{}.layers", 1, 2, 10),
    "dac": {"decoder.block": 4},
    # num_block_repeats · depth_coefficient, rounded up: 4 + 7 + 7 + 10 + 10 + 13 + 4.
    "efficientnet": {"encoder.blocks": 55},
    # Convolution, LSTM, four times upsampling and residual block, convolution.
    "encodec": {"decoder.layers": 11},
    # Attention and feed-forward are residual layers each; all stages but the last have two more.
    "levit": _stages("encoder.stages.{}.layers", 20, 22, 18),
    "mobilenet_v1": {"layer": 26},
    "mobilenet_v2": {"layer": 16},
    "mobilevit": _stages("encoder.layer.{}.transformer.layer", 1, 1, 2, 4, 3),
    "muse_spark_audio": _stages("layers.{}.conv_blocks", 2, 2, 2, 2),
    "nemo_speechlm": {"language_model.layers": 52},
    "nemotron_h": {"layers": 4},
    "perceiver": {"encoder.self_attends": 26},
    "pp_ocrv5_mobile_rec": _stages("backbone.encoder.blocks.{}.layers", 1, 2, 2, 5, 4),
    **dict.fromkeys(
        ("pp_ocrv6_small_det", "pp_ocrv6_small_rec", "pp_ocrv6_tiny_rec"),
        _stages("backbone.encoder.blocks.{}.blocks", 1, 2, 7, 3),
    ),
    "reformer": {"encoder.layers": 6},
    # All stages in one list: 1 + 10 + 9 + 10.
    **{n: {"vision_encoder.backbone.blocks": 30} for n in ("edgetam_video", "sam2", "sam2_video")},
    "sam2_hiera_det_model": {"blocks": 30},
    "sam2_vision_model": {"backbone.blocks": 30},
    "textnet": _stages("encoder.stages.{}.stage", 3, 4, 4, 4),
    "univnet": {"resblocks": 3},
    "uvdoc": _stages("backbone.resnet.resnet_down.{}.layers", 3, 4, 6),
}


def expected(model_type: str, model: nn.Module, counts: dict[str, int]) -> dict[str, int]:
    """The number of blocks by trunk."""
    if model_type in NO_AXIS:
        return {}
    no = re.compile(NO_TRUNKS.get(model_type, "(?!)"))
    found = architectures.containers(model, counts)
    found = {name: n for name, n in found.items() if not no.fullmatch(name)}
    return found | CODE_SAYS.get(model_type, {})
