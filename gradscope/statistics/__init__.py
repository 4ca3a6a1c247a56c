"""The kernels behind the table of statistics: tensors in, scalars out, nothing kept.

Every value is accumulated so that neither the dtype's range nor cancellation can spoil it. On a CPU,
dense float32 and bfloat16 tensors go through an extension module that sums in float64, in one pass for
all statistics (`gradscope.statistics.one_pass`). Where it was not built, and for all else: 16-bit
tensors are widened to float32 first, float32 sums of squares that leave the safe range are redone
in float64 after division by the largest magnitude, and a variance that is small beside the mean
square is redone about the mean. On a CPU those repairs are decided by looking at the first result,
which is free there; on other devices the robust form is always used, because looking would
synchronise the host (that path has been tested on the CPU only).

To add a statistic: one entry in `gradscope.record.STATISTICS` and one function, decorated with
`kernel` (of one tensor) or `pair_kernel` (of two stream positions, or a position and a branch).
"""

from gradscope.statistics import slow as slow  # registers its kernels
from gradscope.statistics.measurement import ACTIVATION, GRADIENT, Values, measure, ordinary_absences
from gradscope.statistics.moments import (
    difference_norm,
    distances,
    inner_product,
    nonfinite,
    norms,
    relate,
    robust_moments,
)
from gradscope.statistics.pairs import (
    BRANCH,
    PAIR_KERNELS,
    SLOW_PAIR,
    measure_branch,
    measure_pair,
    pair_kernel,
)
from gradscope.statistics.pooling import pool
from gradscope.statistics.sample import EMPTY, KERNELS, NO_DIRECTION, Absent, Sample, Value, kernel

__all__ = [
    "ACTIVATION",
    "BRANCH",
    "EMPTY",
    "GRADIENT",
    "KERNELS",
    "NO_DIRECTION",
    "PAIR_KERNELS",
    "SLOW_PAIR",
    "Absent",
    "Sample",
    "Value",
    "Values",
    "difference_norm",
    "distances",
    "inner_product",
    "kernel",
    "measure",
    "measure_branch",
    "measure_pair",
    "nonfinite",
    "norms",
    "ordinary_absences",
    "pair_kernel",
    "pool",
    "relate",
    "robust_moments",
]
