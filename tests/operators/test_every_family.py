"""The walk: every mixture-of-experts family of transformers, as published, under the rule file that fits any of them.

The table is tests/families.py. README's table of what is supported is made from it, so nothing is claimed there that
does not pass here.
"""

import functools
from dataclasses import replace

import families
import pytest
import torch
from tiny import meta_model, random_ids, randomize, relative_error, save
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ktransformers import optimize_and_load, plan
from ktransformers.errors import RuleError
from ktransformers.generate import Sampling, generate
from ktransformers.models import ONE_BY_ONE
from ktransformers.operators.experts import KTransformersExperts
from ktransformers.rules import load_rules

CPU = {"cuda": "cpu"}
PROMPT = random_ids(1, 11)
every_family = pytest.mark.parametrize("model_type", families.known_here())


@functools.cache
def reference(model_type):
    """transformers' own model: random weights, its plainest path."""
    torch.manual_seed(0)
    return randomize(
        AutoModelForCausalLM.from_config(
            families.config_of(model_type), attn_implementation="eager", experts_implementation="eager"
        ).eval()
    )


def rules(op):
    """The default rules with another operator for the experts."""
    experts, rest = load_rules("Default")
    return [replace(experts, kwargs={**experts.kwargs, "generate_op": op, "prefill_op": op}), rest]


def in_pieces(model, ids):
    """Logits of `ids` [1, 11], given to the model in three pieces."""
    cache, logits = None, []
    for piece in ids.split([4, 1, 6], dim=1):
        out = model(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, 1)


@every_family
def test_a_family_computes_as_transformers_does(model_type, tmp_path):
    """Logits, a prefill in pieces by hand and by `generate`, and 32 greedy tokens."""
    truth, op = reference(model_type), families.operator_of(model_type)
    rule = "Default" if op == "KExpertsCPU" else rules(op)
    model = optimize_and_load(meta_model(truth.config), rule, save(truth, tmp_path), devices=CPU, progress=False)
    ours = [module for module in model.modules() if isinstance(module, KTransformersExperts)]
    assert ours and {type(module.active).__name__ for module in ours} == {op}
    with torch.no_grad():
        expected = truth(PROMPT).logits
        assert relative_error(model(PROMPT).logits, expected) < 1e-4
        pieces = in_pieces(truth, PROMPT)
        assert (relative_error(pieces, expected) < 1e-4) == (model_type not in families.PIECES_DIFFER)
        assert relative_error(in_pieces(model, PROMPT), pieces) < 1e-4
    expected = truth.generate(PROMPT, max_new_tokens=32, do_sample=False)
    assert torch.equal(model.generate(PROMPT, max_new_tokens=32, do_sample=False), expected)
    tokens = list(generate(model, PROMPT[0].tolist(), max_new_tokens=8, chunk_size=4, sampling=Sampling()))
    assert tokens == expected[0, 11:19].tolist()


def test_every_type_with_experts_is_in_a_table():
    """Fails when a release of transformers brings a family that nobody looked at."""
    unknown = sorted(set(families.types_with_experts()) - families.FAMILIES.keys() - families.WITHOUT.keys())
    assert not unknown, (
        f"transformers has experts in {', '.join(unknown)}: found in no table of tests/families.py. Add each to FAMILIES, "
        "with what SIZES does not shrink, and run this file; or to WITHOUT, with the reason."
    )


def test_no_table_names_a_type_without_experts():
    """A table entry that transformers does not bear out is a claim about nothing."""
    named = {*families.known_here(), *(t for t in families.WITHOUT if t in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)}
    assert named <= set(families.types_with_experts())
    assert families.TORCH_ONLY.keys() | families.PIECES_DIFFER.keys() <= families.FAMILIES.keys()
    assert set(ONE_BY_ONE) == set(families.PIECES_DIFFER)


@pytest.mark.parametrize("model_type", families.TORCH_ONLY)
def test_experts_that_c_does_not_compute_are_refused_with_the_operator_that_does(model_type):
    with pytest.raises(RuleError, match="generate_op: the C library does not compute .*; use KExpertsTorch"):
        plan(meta_model(reference(model_type).config), "Default", devices=CPU)


@pytest.mark.parametrize("model_type", families.WITHOUT)
def test_experts_of_another_form_are_refused(model_type):
    model = meta_model(families.config_of(model_type))
    with pytest.raises(RuleError, match=r"1 problem.*\n.*trait 'experts' matches 0"):
        plan(model, "Default", devices=CPU)
