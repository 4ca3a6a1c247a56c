"""Gradient-flow diagnostics for PyTorch.

A deep stack trains or dies by what happens to the gradient on its way from the loss to the first
layer. gradscope shows it.

Watch a model train; nothing else in the loop changes::

    import gradscope

    with gradscope.watch(model) as scope:
        for batch in loader:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    scope.plot()                                   # depth against gradient

Measure a model at initialisation, without a training loop::

    record = gradscope.measure(make_model, batch, loss, replicates=5)

Know things from what was measured. A `Record` is plain data: everything below works without torch,
also on another machine::

    record.save("run.jsonl")
    record = gradscope.Record.load("run.jsonl")
    record.to_pandas()                             # tidy, one row per value
    gradscope.profile(record).mean_increment()     # nats per block, with a 95 % interval
    gradscope.fit_decay(record)                    # family of decay, rate, depth scale, intervals
    gradscope.diagnose(record)                     # findings with cause and remedy
    gradscope.verdict(record)                      # vanishing, exploding, preserved, inconclusive
    gradscope.predict([record, deeper], depth=96)  # the gradient at a depth that was not built
    gradscope.compare(record, baseline)            # which layer departed first, with what certainty
    gradscope.plot.depth({"run": record})
    gradscope.plot.heatmap(record)

Find the residual branches of a model as it is, each skip proved with numbers::

    print(gradscope.architecture(model, batch))

Ask how much of the depth the gradient really sees::

    gradscope.effective_depth(model, batch, loss)
    gradscope.path_spectrum(model, batch, loss)    # how much of it came along paths of which length
    gradscope.counterfactual(model, batch, loss)   # what if this skip, or this branch, were cut

Hold a model to it in a test suite, by rules or by a baseline (pytest's fixture ``gradient_baseline``, and
``gradscope check`` on the command line)::

    from gradscope.testing import assert_healthy
    assert_healthy(make_model, batch, loss)
    gradient_baseline.check(make_model, batch, loss)

Ask whether any of it can be trusted on your model and machine::

    print(gradscope.doctor(model, batch, loss))    # every value against plain autograd

`gradscope.reference` holds small residual transformers with every placement of skip and norm. The
command ``gradscope study`` measures and trains them and writes the pictures; ``gradscope show FILE``
prints a Record's layers.

What goes wrong on purpose is a `GradscopeError`, and its message says what to write; what is worth
knowing while a model trains is a `GradscopeWarning`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from gradscope import reference as reference
    from gradscope.analysis import compare as compare
    from gradscope.analysis import depth_limit as depth_limit
    from gradscope.analysis import diagnose as diagnose
    from gradscope.analysis import fit_decay as fit_decay
    from gradscope.analysis import meanfield as meanfield
    from gradscope.analysis import predict as predict
    from gradscope.analysis import profile as profile
    from gradscope.analysis import verdict as verdict
    from gradscope.analysis import verdicts as verdicts
    from gradscope.errors import GradscopeError as GradscopeError
    from gradscope.errors import GradscopeWarning as GradscopeWarning
    from gradscope.experiment.architecture import architecture as architecture
    from gradscope.experiment.counterfactual import counterfactual as counterfactual
    from gradscope.experiment.doctor import doctor as doctor
    from gradscope.experiment.effective_depth import effective_depth as effective_depth
    from gradscope.experiment.measure import measure as measure
    from gradscope.experiment.paths import path_spectrum as path_spectrum
    from gradscope.record import Record as Record
    from gradscope.scope import Scope as Scope
    from gradscope.scope import watch as watch
    from gradscope.show import plots as plot

__version__ = "0.1.0"

__all__ = [
    "GradscopeError",
    "GradscopeWarning",
    "Record",
    "Scope",
    "architecture",
    "compare",
    "counterfactual",
    "depth_limit",
    "diagnose",
    "doctor",
    "effective_depth",
    "fit_decay",
    "meanfield",
    "measure",
    "path_spectrum",
    "plot",
    "predict",
    "profile",
    "reference",
    "verdict",
    "verdicts",
    "watch",
]

# Where each public name lives: "module:attribute", or a module. Loaded at first use, so that
# `import gradscope` costs nothing and a Record can be read and drawn where torch is not installed.
_HOME: Final = {
    "GradscopeError": "gradscope.errors:GradscopeError",
    "GradscopeWarning": "gradscope.errors:GradscopeWarning",
    "Record": "gradscope.record:Record",
    "Scope": "gradscope.scope:Scope",
    "architecture": "gradscope.experiment.architecture:architecture",
    "compare": "gradscope.analysis:compare",
    "counterfactual": "gradscope.experiment.counterfactual:counterfactual",
    "depth_limit": "gradscope.analysis:depth_limit",
    "diagnose": "gradscope.analysis:diagnose",
    "doctor": "gradscope.experiment.doctor:doctor",
    "effective_depth": "gradscope.experiment.effective_depth:effective_depth",
    "fit_decay": "gradscope.analysis:fit_decay",
    "meanfield": "gradscope.analysis.meanfield",
    "measure": "gradscope.experiment.measure:measure",
    "path_spectrum": "gradscope.experiment.paths:path_spectrum",
    "plot": "gradscope.show.plots",
    "predict": "gradscope.analysis:predict",
    "profile": "gradscope.analysis:profile",
    "reference": "gradscope.reference",
    "verdict": "gradscope.analysis:verdict",
    "verdicts": "gradscope.analysis:verdicts",
    "watch": "gradscope.scope:watch",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gradscope' has no attribute {name!r}")
    module, _, attribute = _HOME[name].partition(":")
    found = import_module(module)
    found = getattr(found, attribute) if attribute else found
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
