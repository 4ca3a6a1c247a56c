"""What a command line measures: ``package.module:function``, which returns model, batch and loss."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from gradscope.errors import MeasureError

__all__ = ["Target", "load_target"]

_FORM = (
    "A target is written package.module:function, or path/to/file.py:function; the function takes no "
    "arguments and returns (model, batch) or (model, batch, loss)."
)


@dataclass(frozen=True, slots=True)
class Target:
    """What the function returned.

    Attributes:
        model: a module, or a function that makes one.
        batch: what ``loss`` takes.
        loss: ``loss(model, batch)`` → scalar tensor; None for ``model(**batch).loss``.
    """

    model: Any
    batch: Any
    loss: Callable[[Any, Any], Any] | None = None

    def build(self) -> Any:
        """The model itself; made, where a maker was returned."""
        from torch import nn

        made = self.model if isinstance(self.model, nn.Module) else self.model()
        if not isinstance(made, nn.Module):
            raise MeasureError(f"The target's model is a {type(made).__name__}, no nn.Module. {_FORM}")
        return made


def load_target(text: str) -> Target:
    """Import the module, call the function, look at what it returned.

    Modules are looked for in the current folder first, as ``python -m`` does.

    Raises:
        MeasureError: the text has another form, there is no such module or function, or what it
            returned is something else.
    """
    place, colon, name = text.rpartition(":")
    if not colon or not place or not name:
        raise MeasureError(f"{text!r} is no target. {_FORM}")
    module = _from_file(Path(place)) if place.endswith(".py") else _from_name(place)
    function = getattr(module, name, None)
    if not callable(function):
        known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise MeasureError(
            f"{place} has no function {name!r}; it has {', '.join(known[:8]) or 'none at all'}. {_FORM}"
        )
    returned = function()
    if not isinstance(returned, tuple) or len(cast("tuple[Any, ...]", returned)) not in (2, 3):
        raise MeasureError(f"{text} returned a {type(returned).__name__}. {_FORM}")
    target = Target(*cast("tuple[Any, ...]", returned))
    for what, value in (("model", target.model), ("loss", target.loss)):
        if not callable(value) and not (what == "loss" and value is None):
            raise MeasureError(f"{text}: the {what} is of type {type(value).__name__}. {_FORM}")
    return target


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise MeasureError(f"There is no file {path}. {_FORM}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # what is defined there may be pickled by name
    sys.path.insert(0, str(path.parent.resolve()))
    spec.loader.exec_module(module)
    return module


def _from_name(name: str) -> Any:
    sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise MeasureError(f"There is no module {name!r} here ({Path.cwd()}). {_FORM}") from error
        raise  # the module is there, and something that it imports is not
