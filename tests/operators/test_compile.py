"""Whole models with operators under torch.compile and with tensors that hold no values."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ktransformers import native, optimize_and_load
from tests.tiny import meta_model, random_ids, relative_error, tiny_model

pytestmark = pytest.mark.skipif(not native.available(), reason="C library not built")
MODELS = pytest.mark.parametrize("family, rule", [("qwen3_moe", "MoE"), ("deepseek_v3", "MLA")])


def loaded(family, rule, folder, **overrides):
    truth = tiny_model(family, num_hidden_layers=2, **overrides)
    truth.save_pretrained(folder)
    model = optimize_and_load(meta_model(truth.config), rule, folder, devices={"cuda": "cpu"}, progress=False)
    return truth, model


@MODELS
def test_a_compiled_model_prefills_and_decodes_as_transformers_does(family, rule, tmp_path):
    """fullgraph: nothing in the model sends the tracer back to Python; dynamic: one graph for prompts, one for steps."""
    truth, model = loaded(family, rule, tmp_path)
    torch._dynamo.reset()
    compiled, used = torch.compile(model, backend="eager", fullgraph=True, dynamic=True), []
    ids = random_ids(2, 10)
    with torch.no_grad():
        cache, theirs = None, None
        for begin, end in ((0, 7), (7, 8), (8, 9), (9, 10)):
            found = compiled(ids[:, begin:end], past_key_values=cache, use_cache=True)
            expected = truth(ids[:, begin:end], past_key_values=theirs, use_cache=True)
            cache, theirs = found.past_key_values, expected.past_key_values
            used.append(relative_error(found.logits, expected.logits))
    assert max(used) < 1e-4, used


@MODELS
def test_shapes_of_a_model_without_values(family, rule, tmp_path):
    _, model = loaded(family, rule, tmp_path)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    ids = mode.from_tensor(random_ids(2, 7))
    with mode, torch.no_grad():
        logits = model(ids).logits
    assert (tuple(logits.shape), logits.dtype, logits.device.type) == ((2, 7, 128), torch.float32, "cpu")
