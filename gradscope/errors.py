"""Every exception and warning that gradscope raises, in one tree.

::

    GradscopeError (Exception)
    ├── GateError (ValueError)        a gradient baseline, its file or a tolerance that cannot be used
    ├── LayerError (ValueError)       the model's layers: no trunk, an unknown pattern
    ├── RecordError (ValueError)      a Record's content or its file: damaged, newer, overlapping
    │   └── RecordInUseError          another process appends to the file
    ├── QuantityError (ValueError)    a derived quantity that a Record cannot give
    ├── MeasureError (RuntimeError)   an experiment that cannot be run on this model or batch
    └── StudyError (RuntimeError)     the study command cannot go on

    GradscopeWarning (UserWarning)    said once, during training, never fatal

A message says what was seen, where, the likely cause, and the line to write.
"""

__all__ = [
    "GateError",
    "GradscopeError",
    "GradscopeWarning",
    "LayerError",
    "MeasureError",
    "QuantityError",
    "RecordError",
    "RecordInUseError",
    "StudyError",
]


class GradscopeError(Exception):
    """Base of all errors that gradscope raises on purpose."""


class GateError(GradscopeError, ValueError):
    """A gradient baseline cannot be used, nor its file, nor a tolerance, with the reason."""


class LayerError(GradscopeError, ValueError):
    """The model's layers do not give what was asked: no trunk found, an unknown layer pattern."""


class RecordError(GradscopeError, ValueError):
    """A Record, or its file, cannot be used: damaged, of a newer schema, or overlapping another."""


class RecordInUseError(RecordError):
    """Another process, or another watch of this one, appends to the file now.

    Attributes:
        last_step: the largest step number in the file, or -1.
    """

    def __init__(self, message: str, last_step: int = -1) -> None:
        super().__init__(message)
        self.last_step = last_step


class QuantityError(GradscopeError, ValueError):
    """A derived quantity cannot be had from this Record, with the reason."""


class MeasureError(GradscopeError, RuntimeError):
    """An experiment cannot be run on this model, batch or loss, with the reason."""


class StudyError(GradscopeError, RuntimeError):
    """The study cannot go on, with the reason."""


class GradscopeWarning(UserWarning):
    """Something worth knowing happened while a model was watched; training goes on."""
