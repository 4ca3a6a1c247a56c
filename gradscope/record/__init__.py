"""The Record: everything that was measured, immutable, and readable without torch.

A Record is a header (what was measured, on what, with which seeds) and a sequence of
`Step` entries. All steps of one model share one `Rows` table that says, for each value,
which layer, call, signal and statistic it is; a step then holds only numbers and the
reason for each number that is absent. ``Record.to_pandas()`` gives the tidy table.

`table` lists the statistics, `steps` holds rows and steps, `data` the Record, `file` its format on disk.
"""

from gradscope.record.data import Record
from gradscope.record.file import RecordWriter
from gradscope.record.steps import OUTSIDE, SCHEMA, Rows, Step, thin
from gradscope.record.table import SIGNALS, STATISTICS, Statistic

__all__ = [
    "OUTSIDE",
    "SCHEMA",
    "SIGNALS",
    "STATISTICS",
    "Record",
    "RecordWriter",
    "Rows",
    "Statistic",
    "Step",
    "thin",
]
