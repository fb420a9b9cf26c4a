"""What `ktransformers.rules.explain` says of modules agrees with the plan, for every file of the published style."""

import re
import warnings

import pytest

from ktransformers.errors import ranges
from ktransformers.rules.explain import expert_devices, grouped, layer_devices, outcomes
from ktransformers.rules.plan import load_rules, plan
from tests.rules.test_published import STYLES
from tests.tiny import meta_model, tiny_config


@pytest.mark.parametrize("name", STYLES)
def test_every_rule_either_has_a_module_or_a_reason(name):
    style = STYLES[name]
    model = meta_model(tiny_config(style.family, **style.overrides))
    with warnings.catch_warnings(action="ignore"):
        file = load_rules(style.rules())
        found = plan(model, file, gpus=8)
    told = {outcome.name: outcome for outcome in outcomes(model, file, found)}
    assert set(told) == {name for name, _ in model.named_modules() if name}
    for module, outcome in told.items():
        winner = found[module].rule.number if module in found and found[module].rule else None
        assert set(outcome.reasons) | {winner} == {rule.number for rule in file} | {winner}, module
        assert winner not in outcome.reasons
        assert bool(outcome.hidden) == (module not in found)
        for number, reason in outcome.reasons.items():
            if first := re.search(r"rule (\d+) comes first", reason):
                assert int(first[1]) == winner < number, module
    groups = grouped(model, told.values())
    assert sum(len(group.names) for group in groups) == len(told)
    for group in groups:
        assert len({found[name].rule and found[name].rule.number for name in group.names if name in found}) <= 1


def test_devices_of_layers_leave_experts_out():
    style = STYLES["DeepSeek-V3 two GPUs"]
    model = meta_model(tiny_config(style.family, **style.overrides))
    with warnings.catch_warnings(action="ignore"):
        found = plan(model, style.rules(), gpus=2)
    assert [set(counts) for counts in layer_devices(model, found)] == [{"cuda:0"}] * 3 + [{"cuda:1"}] * 3
    assert [dict(counts) for counts in expert_devices(model, found)] == [{}] + [{"cpu": 1}] * 5


def test_spans_read_back():
    assert ranges([5, 3, 4, 8]) == "3-5,8" and ranges([7]) == "7" and ranges([]) == ""
