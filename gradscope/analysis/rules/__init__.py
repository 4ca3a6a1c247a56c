"""The health rules: one decorated function each, by family. Importing this package registers them.

The order matters: a finding can be explained only by one that began earlier, or at the same step by a
rule that stands earlier here.

- `numerics`: non-finite values, overflow of the loss scale, underflow of gradients.
- `training`: update-to-weight ratio, sudden spikes.
- `dead`: layers and units through which nothing passes.
- `activations`: saturated bounded activations, massive activations.
- `collapse`: rank collapse of the tokens, starved queries and keys.
- `depth`: one layer off the curve; vanishing and exploding, backward and forward.
"""

from __future__ import annotations

# In this order: see above.
from gradscope.analysis.rules import numerics as numerics  # isort: split

from gradscope.analysis.rules import training as training  # isort: split

from gradscope.analysis.rules import dead as dead  # isort: split

from gradscope.analysis.rules import activations as activations  # isort: split

from gradscope.analysis.rules import collapse as collapse  # isort: split

from gradscope.analysis.rules import depth as depth

__all__ = ["activations", "collapse", "dead", "depth", "numerics", "training"]
