"""Every health rule finds the fault planted for it, names the layer, and spares the twin without it.

What is particular to a rule is in ``test_rules_*.py``, what a diagnosis makes of findings in
``test_diagnosis.py``, and that no rule fires on healthy networks in ``test_healthy.py``.
"""

from __future__ import annotations

import pytest
from planted import PLANTED, reasons

from gradscope.analysis.diagnosis import RULES, SEVERITIES, register


def test_every_rule_has_a_planted_fault() -> None:
    assert set(PLANTED) == set(RULES)


@pytest.mark.parametrize("name", RULES)
def test_the_planted_fault_is_found_and_its_layer_named(name: str) -> None:
    fault = PLANTED[name]
    found = fault.run(True).of(name)
    assert found, f"{name} saw nothing"
    for finding in found:
        assert finding.message and finding.cause and finding.remedy and finding.threshold_source
    if fault.layer:
        assert any(fault.layer in finding.layers for finding in found), [f.layers for f in found]
        assert not fault.first or found[0].layers[0] == fault.layer


@pytest.mark.parametrize("name", RULES)
def test_the_twin_without_the_fault_is_spared_by_a_rule_that_looked(name: str) -> None:
    diagnosis = PLANTED[name].run(False)
    assert not diagnosis.of(name), diagnosis
    assert not reasons(diagnosis, name)


def test_every_rule_says_what_it_is() -> None:
    for name, item in RULES.items():
        assert item.name == name
        assert len(item.meaning) > 60 and item.citation and item.title
        assert item.severity in SEVERITIES
        assert item.thresholds
        assert all(t.source and t.unit for t in item.thresholds.values())
        assert set(item.explained_by) <= set(RULES) - {name}
    with pytest.raises(ValueError, match="already registered"):
        register(RULES["vanishing"])
