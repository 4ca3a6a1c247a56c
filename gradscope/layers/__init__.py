"""What is watched: layers by name, and the depth axis found in an unmodified model.

`naming` names modules, `trunks` finds the depth axis, `tensor_axes` says which axes of an output hold
features and tokens, and `selection` chooses layers by name, class or predicate.
"""

from gradscope.layers.naming import callable_layers, class_name, named_layers
from gradscope.layers.selection import Layer, Selection, select
from gradscope.layers.trunks import Trunk, find_branches, find_trunks

__all__ = [
    "Layer",
    "Selection",
    "Trunk",
    "callable_layers",
    "class_name",
    "find_branches",
    "find_trunks",
    "named_layers",
    "select",
]
