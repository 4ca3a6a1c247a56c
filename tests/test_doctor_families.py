"""The doctor on small random models of every family of the transformers library that is listed."""

from __future__ import annotations

import pytest
from hub_models import FAMILIES, build

import gradscope

#: Trunk → number of blocks, from the configurations; a block that is called again counts once.
AXES = {
    "albert": {"albert.encoder.albert_layer_groups.0.albert_layers": 1},
    "t5": {"encoder.block": 2, "decoder.block": 2},
    "bart": {"model.encoder.layers": 2, "model.decoder.layers": 2},
    "whisper": {"model.encoder.layers": 2, "model.decoder.layers": 2},
    "clip": {"text_model.encoder.layers": 2, "vision_model.encoder.layers": 2},
    "llava": {"model.vision_tower.encoder.layers": 2, "model.language_model.layers": 2},
    "swin": {"swin.encoder.layers.0.blocks": 2, "swin.encoder.layers.1.blocks": 2},
    "convnext": {
        "convnext.encoder.stages.0.layers": 2,
        "convnext.encoder.stages.1.layers": 2,
    },
    "resnet": {"resnet.encoder.stages.0.layers": 2, "resnet.encoder.stages.1.layers": 2},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_value_is_right_or_absent_with_a_reason(name: str) -> None:
    model, batch = build(name)
    report = gradscope.doctor(model, batch, seconds=0, progress=False)
    assert report.ok, str(report)
    assert report.right > 400
    axis = next(check.detail for check in report.checks if check.name == "depth axis")
    found = dict(part.split(": ") for part in axis.split(", "))
    found = {trunk: int(blocks.split()[0]) for trunk, blocks in found.items()}
    if name in AXES:
        assert found == AXES[name]
    else:
        assert list(found.values()) == [2]


def test_there_are_enough_families() -> None:
    assert len(FAMILIES) >= 20
