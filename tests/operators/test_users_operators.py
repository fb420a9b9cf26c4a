"""Operators as users write them: constructors of any form, and failures that name module, rule and the user's line."""

import traceback

import pytest
import torch
from torch import nn

from ktransformers import optimize_and_load
from ktransformers.errors import RuleError, WeightError
from ktransformers.operators.base_operator import BaseInjectedModule
from ktransformers.operators.linear import KLinearBase
from tests.tiny import meta_model, random_ids, relative_error

NAME = "^model\\.layers\\.1\\.self_attn\\.o_proj$"
MODULE = "model.layers.1.self_attn.o_proj"


class Tutorial(BaseInjectedModule, KLinearBase):
    """As the tutorial's: the device that it names is handed on by position."""

    def __init__(self, key, gguf_loader, config, orig_module=None, generate_device="cuda", scale=1.0, **kwargs):
        super().__init__(key, gguf_loader, config, orig_module, generate_device, **kwargs)
        KLinearBase.__init__(self)

    def load(self):
        self.w = self.load_weight(device=self.device, dtype=torch.float32)

    def forward(self, x):
        return nn.functional.linear(x, self.w)


class ByKeyword(Tutorial):
    def __init__(self, key, gguf_loader, config, orig_module=None, generate_device="cuda", **kwargs):
        BaseInjectedModule.__init__(
            self, key, gguf_loader, config, orig_module, generate_device=generate_device, **kwargs
        )
        KLinearBase.__init__(self)


class Anything(Tutorial):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


class AnythingAtAll(BaseInjectedModule, KLinearBase):
    load, forward = Tutorial.load, Tutorial.forward

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        KLinearBase.__init__(self)


def optimized(checkpoint, operator, **kwargs):
    reference, folder = checkpoint("qwen3_moe")
    rule = [{
        "match": {"name": NAME},
        "replace": {"class": f"{operator.__module__}.{operator.__qualname__}", "kwargs": kwargs},
    }]  # fmt: skip
    return reference, optimize_and_load(
        meta_model(reference.config), rule, folder, default_device="cpu", progress=False
    )


@pytest.mark.parametrize("operator", [Tutorial, ByKeyword, Anything, AnythingAtAll])
@pytest.mark.parametrize(
    "devices", [{}, {"prefill_device": "cpu"}, {"generate_device": "cpu"},
                {"generate_device": "cpu", "prefill_device": "cpu:0"}], ids=lambda d: " ".join(d) or "none"
)  # fmt: skip
def test_any_constructor_takes_the_devices_that_a_rule_names(checkpoint, operator, devices):
    reference, model = optimized(checkpoint, operator, **devices)
    placed = model.get_submodule(MODULE)
    assert placed.generate_device == "cpu"
    if "prefill_device" in devices:
        assert placed.prefill_device == devices["prefill_device"]
    with torch.no_grad():
        assert relative_error(model(random_ids(1, 5)).logits, reference(random_ids(1, 5)).logits) < 1e-5


class FailsIn__init__(Tutorial):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.table = {}["here it fails"]


class FailsInload(Tutorial):
    def load(self):
        self.w = None + "here it fails"


@pytest.mark.parametrize("operator, method", [(FailsIn__init__, "__init__"), (FailsInload, "load")])
def test_a_failure_while_building_or_loading_names_module_rule_and_line(checkpoint, operator, method):
    with pytest.raises(RuleError) as caught:
        optimized(checkpoint, operator)
    text = str(caught.value)
    assert text.startswith(f"rule 1: {operator.__name__}.{method} for {MODULE} raised ")
    assert "test_users_operators.py:" in text and "here it fails" in text
    assert type(caught.value.__cause__) in (KeyError, TypeError)


class WeightGone(Tutorial):
    def load(self):
        self.gguf_loader.tensor("nobody")


def test_an_error_of_this_package_stays_what_it_is_and_gets_a_note(checkpoint):
    with pytest.raises(WeightError, match="nobody") as caught:
        optimized(checkpoint, WeightGone)
    assert caught.value.__notes__ == [f"in rule 1: WeightGone.load for {MODULE}"]


class FailsInForward(Tutorial):
    def forward(self, x):
        return x @ self.absent


def test_a_failure_in_forward_keeps_its_type_and_names_module_and_rule(checkpoint):
    _, model = optimized(checkpoint, FailsInForward)
    with pytest.raises(AttributeError, match="absent") as caught:
        model(random_ids(1, 3))
    text = "".join(traceback.format_exception(caught.value))
    assert text.rstrip().endswith(f"in rule 1: FailsInForward.forward for {MODULE}")
    assert "x @ self.absent" in text and caught.value.__notes__ == [f"in rule 1: FailsInForward.forward for {MODULE}"]


class SaysText(Tutorial):
    said = "not today"

    @classmethod
    def check(cls, key, orig_module, kwargs, weights=None):
        if isinstance(cls.said, Exception):
            raise cls.said
        return cls.said


@pytest.mark.parametrize(
    "said, expected",
    [
        ("not today", f"{MODULE}: not today"),
        (["not today"], f"{MODULE}: not today"),
        (("first", "second"), f"{MODULE}: first"),
        (None, f"{MODULE}: SaysText.check returned nothing (None), expected a list of problems"),
        (3, f"{MODULE}: SaysText.check returned 3, expected a list of problems"),
        (True, f"{MODULE}: SaysText.check returned True, expected a list of problems"),
        (KeyError("lost"), f"{MODULE}: SaysText.check raised KeyError: 'lost' (test_users_operators.py:"),
    ],
    ids=str,
)
def test_what_check_says_in_any_form_is_listed_or_refused(checkpoint, monkeypatch, said, expected):
    monkeypatch.setattr(SaysText, "said", said)
    with pytest.raises(RuleError) as caught:
        optimized(checkpoint, SaysText)
    assert expected in str(caught.value)


@pytest.mark.parametrize("said", ["", [], ()])
def test_a_check_that_says_nothing_lets_the_operator_in(checkpoint, monkeypatch, said):
    monkeypatch.setattr(SaysText, "said", said)
    optimized(checkpoint, SaysText)


class ForgetsItsBase(BaseInjectedModule):
    def __init__(self, *args, **kwargs):
        pass


def test_a_constructor_that_forgets_its_base_is_named(checkpoint):
    with pytest.raises(RuleError, match=rf"ForgetsItsBase for {MODULE}: its __init__ did not call .*super\(\)"):
        optimized(checkpoint, ForgetsItsBase)
