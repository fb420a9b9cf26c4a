"""The walk: every mixture-of-experts family of transformers, as published, under the rule file that fits any of them.

The table is tests/families.py. README's table of what is supported is made from it, so nothing is claimed there that
does not pass here.
"""

import functools
import json
import re
from dataclasses import replace

import pytest
import torch
from ktransformers.models import DEFAULT_RULES, ONE_BY_ONE
from ktransformers.models.traits import find_layers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ktransformers import optimize_and_load, plan
from ktransformers.engine.generate import generate
from ktransformers.engine.sampling import Sampling
from ktransformers.errors import RuleError
from ktransformers.native.layers import Layers
from ktransformers.operators.experts import KTransformersExperts
from ktransformers.operators.gate import KMoEGate
from ktransformers.operators.moe import KMoEBlock
from ktransformers.operators.paged_attention import PagedAttention
from ktransformers.rules.plan import load_rules
from tests import families, support
from tests.tiny import meta_model, random_ids, randomize, relative_error, save

CPU = {"cuda": "cpu"}
PROMPT = random_ids(1, 11)


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
    file = load_rules("Default")
    ops = {"generate_op": op, "prefill_op": op}
    return replace(file, rules=tuple(replace(r, kwargs={**r.kwargs, **ops}) if r.trait == "experts" else r for r in file))


def in_c(model):
    """(routers that C computes, blocks that C computes), of a model that has computed."""
    blocks = [m for m in model.modules() if isinstance(m, KMoEBlock)]
    whole = [block for block in blocks if block.how()]
    gates = [m for m in model.modules() if isinstance(m, KMoEGate)]
    parts = {id(child) for block in whole for child in block.children()}
    return [gate for gate in gates if gate.is_in_c or id(gate) in parts], whole


def in_pieces(model, ids):
    """Logits of `ids` [1, 11], given to the model in three pieces."""
    cache, logits = None, []
    for piece in ids.split([4, 1, 6], dim=1):
        out = model(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, 1)


WALK = [(model_type, "Default") for model_type in families.known_here()]
WALK += [(model_type, DEFAULT_RULES[model_type]) for model_type in families.known_here() if model_type in DEFAULT_RULES]


@pytest.fixture
def calls(monkeypatch):
    """How many layers each native call computed."""
    counted, forward = [], Layers.forward
    monkeypatch.setattr(Layers, "forward", lambda self, *a, **k: counted.append(len(self.layers)) or forward(self, *a, **k))
    return counted


@pytest.mark.parametrize(("model_type", "rule"), WALK)
def test_a_family_computes_as_transformers_does(model_type, rule, tmp_path, calls):
    """Logits, a prefill in pieces by hand and by `generate`, and 32 greedy tokens."""
    truth, op = reference(model_type), families.operator_of(model_type)
    rule = rule if op == "KExpertsCPU" else rules(op)
    model = optimize_and_load(meta_model(truth.config), rule, save(truth, tmp_path), devices=CPU, progress=False)
    ours = [module for module in model.modules() if isinstance(module, KTransformersExperts)]
    assert ours and {type(module.active).__name__ for module in ours} == {op}
    with torch.no_grad():
        expected = truth(PROMPT).logits
        assert relative_error(model(PROMPT).logits, expected) < 1e-4
        routers, blocks = in_c(model)
        assert bool(routers) == (model_type not in families.ROUTER_NOT_IN_C)
        assert bool(blocks) == (model_type not in families.BLOCK_NOT_IN_C)
        natively = any(isinstance(m, PagedAttention) and m.native is not None for m in model.modules())
        assert natively == (model_type not in families.ATTENTION_NOT_NATIVE) or rule != "Default"
        pieces = in_pieces(truth, PROMPT)
        assert (relative_error(pieces, expected) < 1e-4) == (model_type not in families.PIECES_DIFFER)
        assert relative_error(in_pieces(model, PROMPT), pieces) < 1e-4
    whole = len(find_layers(model)[1])
    assert (whole in calls) == (model_type not in families.DECODER_NOT_NATIVE) or rule != "Default"
    if whole in calls and rule == "Default":
        assert (set(calls) == {whole}) == (model_type not in families.PROMPT_NOT_NATIVE)
    expected = truth.generate(PROMPT, max_new_tokens=32, do_sample=False)
    assert torch.equal(model.generate(PROMPT, max_new_tokens=32, do_sample=False), expected)
    tokens = list(generate(model, PROMPT[0].tolist(), max_new_tokens=8, chunk_size=4, sampling=Sampling()))
    assert tokens == expected[0, 11:19].tolist()


def test_most_families_are_computed_in_c():
    """The counts that README claims: 55 of 60 routers, 50 blocks, 54 kinds of attention; and 33 whole decoders, 3 of
    them for steps of one token alone."""
    known = set(families.known_here())
    assert len(known) == 60
    assert len(known - families.ROUTER_NOT_IN_C.keys()) == 55 and len(known - families.BLOCK_NOT_IN_C.keys()) == 50
    assert len(known - families.ATTENTION_NOT_NATIVE.keys()) == 54
    whole = known - families.DECODER_NOT_NATIVE.keys()
    assert len(whole) == 33 and len(whole - families.PROMPT_NOT_NATIVE) == 30


def test_every_type_with_experts_is_in_a_table():
    """Fails when a release of transformers brings a family that nobody looked at."""
    unknown = sorted(set(families.types_with_experts()) - families.FAMILIES.keys() - families.WITHOUT.keys())
    assert not unknown, (
        f"transformers has experts in {', '.join(unknown)}: found in no table of tests/families.py. Add each to FAMILIES, "
        "with what SIZES does not shrink, and run this file; or to WITHOUT, with the reason."
    )


def test_the_readme_says_what_is_tested_here():
    text = support.README.read_text(encoding="utf-8")
    assert support.rewritten(text) == text, "models/README.md is out of date. Run `make support`."


def test_no_table_names_a_type_without_experts():
    """A table entry that transformers does not bear out is a claim about nothing."""
    named = {*families.known_here(), *(t for t in families.WITHOUT if t in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)}
    assert named - {*families.ADDED} <= set(families.types_with_experts())
    assert families.TORCH_ONLY.keys() | families.PIECES_DIFFER.keys() <= families.FAMILIES.keys()
    assert set(ONE_BY_ONE) == set(families.PIECES_DIFFER)


@pytest.mark.parametrize("model_type", families.TORCH_ONLY)
def test_experts_that_c_does_not_compute_are_refused_with_the_operator_that_does(model_type):
    with pytest.raises(RuleError, match="generate_op: the C library does not compute .*; use KExpertsTorch"):
        plan(meta_model(reference(model_type).config), "Default", devices=CPU)


@pytest.mark.parametrize("model_type", families.WITHOUT)
def test_experts_of_another_form_are_refused(model_type):
    model = meta_model(families.config_of(model_type))
    with pytest.raises(RuleError, match=r"(?s)problem.*trait 'experts' matches 0"):
        plan(model, "Default", devices=CPU)


PUBLISHED_WHOLE = {
    # how the checkpoint of a multimodal model names its text part, and tensors of its other parts
    "llama4_text": ("language_model.", ["vision_model.class_embedding", "multi_modal_projector.linear_1.weight"]),
    "qwen3_5_moe_text": ("", ["model.visual.pos_embed.weight", "mtp.fc.weight"]),
}


@pytest.mark.parametrize("model_type", PUBLISHED_WHOLE)
def test_the_text_part_of_a_multimodal_checkpoint(model_type, tmp_path):
    """A causal LM takes its part of the whole file, as it does in transformers."""
    truth, (prefix, others) = reference(model_type), PUBLISHED_WHOLE[model_type]
    tensors = load_file(save(truth, tmp_path) / "model.safetensors")
    inner = (lambda name: prefix + name) if prefix else (lambda name: re.sub(r"^model\.", "model.language_model.", name))
    tensors = {inner(name): tensor for name, tensor in tensors.items()} | {name: torch.ones(2) for name in others}
    save_file(tensors, tmp_path / "model.safetensors")
    model = optimize_and_load(meta_model(truth.config), "Default", tmp_path, devices=CPU, progress=False)
    with torch.no_grad():
        assert relative_error(model(PROMPT).logits, truth(PROMPT).logits) < 1e-4


def test_experts_that_pass_their_input_on_have_no_weights_in_the_file(tmp_path):
    """transformers writes rows for them that nothing reads; LongCat-Flash is published without."""
    truth = reference("longcat_flash")
    tensors = load_file(save(truth, tmp_path) / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not re.search(r"\.experts\.(8|9|10|11)\.", name)}
    assert len(kept) < len(tensors)
    save_file(kept, tmp_path / "model.safetensors")
    model = optimize_and_load(meta_model(truth.config), "Default", tmp_path, devices=CPU, progress=False)
    with torch.no_grad():
        assert relative_error(model(PROMPT).logits, truth(PROMPT).logits) < 1e-4


def test_kimi_k2_needs_no_code_of_its_repository(tmp_path):
    """Its config.json names a model type of its own and Python files; neither is asked for."""
    save(reference("kimi_k2"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"architectures": ["DeepseekV3ForCausalLM"], "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = meta_model(AutoConfig.from_pretrained(tmp_path))
    optimize_and_load(model, "DeepSeek-V3", devices=CPU, progress=False)
    with torch.no_grad():
        assert relative_error(model(PROMPT).logits, reference("kimi_k2")(PROMPT).logits) < 1e-4
