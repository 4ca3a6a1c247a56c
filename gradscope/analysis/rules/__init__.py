"""The health rules: one decorated function each, one idea a file. Importing this package registers them.

The order matters: a finding can be explained only by one that began earlier, or at the same step by a
rule that stands earlier here.

- `non_finite`: NaN and infinite values, and where they began.
- `loss_scale`: steps that a gradient scaler skips.
- `underflow`: gradients that become exactly 0 because their dtype holds nothing smaller.
- `gradient_path`: layers to which no gradient can come.
- `updates`: update-to-weight ratio.
- `spikes`: sudden jumps of the loss or of gradients.
- `dead`: layers through which nothing passes, and those that are zero by construction.
- `dead_units`: units that are zero for nearly every input.
- `saturation`: bounded activations at their bounds.
- `massive`: single elements far above all others.
- `collapse`: rank collapse of the tokens, starved queries and keys.
- `one_layer`: one layer off the curve, the first block included.
- `depth`: vanishing and exploding over the whole depth, backward and forward.

`trend` holds no rule: it is what the last two read.
"""

from __future__ import annotations

# In this order: see above.
from gradscope.analysis.rules import non_finite as non_finite  # isort: split

from gradscope.analysis.rules import loss_scale as loss_scale  # isort: split

from gradscope.analysis.rules import underflow as underflow  # isort: split

from gradscope.analysis.rules import gradient_path as gradient_path  # isort: split

from gradscope.analysis.rules import updates as updates  # isort: split

from gradscope.analysis.rules import spikes as spikes  # isort: split

from gradscope.analysis.rules import dead as dead  # isort: split

from gradscope.analysis.rules import dead_units as dead_units  # isort: split

from gradscope.analysis.rules import saturation as saturation  # isort: split

from gradscope.analysis.rules import massive as massive  # isort: split

from gradscope.analysis.rules import collapse as collapse  # isort: split

from gradscope.analysis.rules import one_layer as one_layer  # isort: split

from gradscope.analysis.rules import depth as depth

__all__ = [
    "collapse",
    "dead",
    "dead_units",
    "depth",
    "gradient_path",
    "loss_scale",
    "massive",
    "non_finite",
    "one_layer",
    "saturation",
    "spikes",
    "underflow",
    "updates",
]
