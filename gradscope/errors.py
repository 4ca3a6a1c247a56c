"""Every exception and warning that gradscope raises, in one tree.

::

    GradscopeError (Exception)
    ├── LayerError (ValueError)       the model's layers: no trunk, an unknown pattern
    ├── RecordError (ValueError)      a Record's content or its file: damaged, newer, overlapping
    ├── QuantityError (ValueError)    a derived quantity that a Record cannot give
    ├── MeasureError (RuntimeError)   an experiment that cannot be run on this model or batch
    └── StudyError (RuntimeError)     the study command cannot go on

    GradscopeWarning (UserWarning)    said once, during training, never fatal

A message says what was seen, where, the likely cause, and the line to write.
"""

__all__ = [
    "GradscopeError",
    "GradscopeWarning",
    "LayerError",
    "MeasureError",
    "QuantityError",
    "RecordError",
    "StudyError",
]


class GradscopeError(Exception):
    """Base of all errors that gradscope raises on purpose."""


class LayerError(GradscopeError, ValueError):
    """The model's layers do not give what was asked: no trunk found, an unknown layer pattern."""


class RecordError(GradscopeError, ValueError):
    """A Record, or its file, cannot be used: damaged, of a newer schema, or overlapping another."""


class QuantityError(GradscopeError, ValueError):
    """A derived quantity cannot be had from this Record, with the reason."""


class MeasureError(GradscopeError, RuntimeError):
    """An experiment cannot be run on this model, batch or loss, with the reason."""


class StudyError(GradscopeError, RuntimeError):
    """The study cannot go on, with the reason."""


class GradscopeWarning(UserWarning):
    """Something worth knowing happened while a model was watched; training goes on."""
