"""The health rules: one decorated function each, by family. Importing this package registers them.

The order matters: a finding can be explained only by one that began earlier, or at the same step by a
rule that stands earlier here.

- `numerics`: non-finite values, overflow of the loss scale.
- `underflow`: gradients that become exactly 0 because their dtype holds nothing smaller.
- `gradient_path`: layers to which no gradient can come.
- `training`: update-to-weight ratio, sudden spikes.
- `dead`: layers and units through which nothing passes.
- `saturation`: bounded activations at their bounds.
- `massive`: single elements far above all others.
- `collapse`: rank collapse of the tokens, starved queries and keys.
- `one_layer`: one layer off the curve, the first block included.
- `depth`: vanishing and exploding over the whole depth, backward and forward.

`trend` holds no rule: it is what the last two read.
"""

from __future__ import annotations

# In this order: see above.
from gradscope.analysis.rules import numerics as numerics  # isort: split

from gradscope.analysis.rules import underflow as underflow  # isort: split

from gradscope.analysis.rules import gradient_path as gradient_path  # isort: split

from gradscope.analysis.rules import training as training  # isort: split

from gradscope.analysis.rules import dead as dead  # isort: split

from gradscope.analysis.rules import saturation as saturation  # isort: split

from gradscope.analysis.rules import massive as massive  # isort: split

from gradscope.analysis.rules import collapse as collapse  # isort: split

from gradscope.analysis.rules import one_layer as one_layer  # isort: split

from gradscope.analysis.rules import depth as depth

__all__ = [
    "collapse",
    "dead",
    "depth",
    "gradient_path",
    "massive",
    "numerics",
    "one_layer",
    "saturation",
    "training",
    "underflow",
]
