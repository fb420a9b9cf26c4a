"""How keys and values are kept (`--cache`): what is asked for is what every way to run a model has, and what kt plan counts."""

import warnings

import pytest
import torch
from ktransformers.models import embedded_model
from transformers import AutoModelForCausalLM

from ktransformers import KTConfig, optimize_and_load
from ktransformers.configs import read_config
from ktransformers.engine.cache import PrefixCache
from ktransformers.engine.generate import generate
from ktransformers.engine.load import load
from ktransformers.errors import NativeError, UnsupportedError
from ktransformers.machine import hardware
from ktransformers.native.pages import TYPES
from ktransformers.operators.paged_cache import PagedCache
from ktransformers.planner import probes
from ktransformers.planner.plan import Planner, Request
from tests.tiny import meta_model, random_ids

ATTENTION = {
    "match": {"trait": "attention"},
    "replace": {"class": "ktransformers.operators.attention.KDeepseekV2Attention"},
}


def kinds(cache):
    """The types in which layers keep keys and values."""
    assert isinstance(cache, PagedCache)
    return {layer.pages.kind for layer in cache.layers}


@pytest.fixture(scope="module")
def q8_0():
    """The embedded model with a cache in q8_0."""
    return load(cache="q8_0")[0]


def test_every_way_to_run_keeps_what_was_asked_for(q8_0):
    cache = PrefixCache()
    answer = list(generate(q8_0, [5, 6, 7, 8], max_new_tokens=5, cache=cache))
    assert answer and kinds(cache.cache) == {"q8_0"}
    cache.reuse([9, 9])  # begins anew
    list(generate(q8_0, [9, 9], max_new_tokens=2, cache=cache))
    assert kinds(cache.cache) == {"q8_0"}
    with torch.inference_mode():
        ids = random_ids(1, 4)
        assert kinds(q8_0(ids, use_cache=True).past_key_values) == {"q8_0"}
        found = q8_0.generate(ids, max_new_tokens=3, return_dict_in_generate=True, do_sample=False)
    assert kinds(found.past_key_values) == {"q8_0"}


def test_a_rule_file_that_leaves_the_model_to_transformers():
    model = meta_model(read_config(embedded_model()))
    optimize_and_load(model, [ATTENTION], embedded_model(), cache="f16", default_device="cpu")
    cache = PrefixCache()
    list(generate(model, [5, 6, 7], max_new_tokens=2, cache=cache))
    assert kinds(cache.cache) == {"f16"}


@pytest.mark.parametrize("kind", [None, *TYPES])
def test_memory_is_what_the_plan_says(kind):
    model = load(cache=kind or "")[0]
    planner = Planner(str(embedded_model()))
    told = planner.answer(hardware.describe((), "8GiB"), Request(context=128, cache=kind), probes.assumed(4))
    with torch.inference_mode():
        cache = model(random_ids(1, 128), use_cache=True).past_key_values
    assert told.memory["cpu"].cache == cache.nbytes
    assert not any(note.startswith("Cache:") for note in told.notes)


def test_the_plan_says_what_does_not_take_the_type():
    planner = Planner("qwen3-30b-a3b", form="Q4_K_M")
    plain, found = (
        planner.plan(hardware.describe(("80GiB",), "64GiB"), Request(cache=kind)) for kind in (None, "q8_0")
    )
    assert found.memory["cuda:0"].cache == plain.memory["cuda:0"].cache
    assert any("0 of 48 layers keep q8_0" in note for note in found.notes)
    with pytest.raises(UnsupportedError, match="found type 'q4'"):
        planner.plan(hardware.describe((), "64GiB"), Request(cache="q4"))


def test_transformers_door(checkpoint):
    folder = checkpoint("qwen3_moe", head_dim=32)[1]
    config = KTConfig(rule="Qwen3-MoE", devices={"cuda": "cpu"}, cache="q8_0")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    with torch.inference_mode():
        assert kinds(model(random_ids(1, 4), use_cache=True).past_key_values) == {"q8_0"}


def test_what_cannot_be_is_said_once(checkpoint):
    reference, folder = checkpoint("qwen3_moe", head_dim=16)
    for call in (lambda: load(cache="q4"), lambda: KTConfig(rule="Qwen3-MoE", cache="q4")):
        with pytest.raises(UnsupportedError, match="found type 'q4', expected one of f32, f16, bf16, q8_0, fp8"):
            call()
    with pytest.raises(NativeError, match="heads of 16 and 16 values, expected multiples of 32"):
        optimize_and_load(meta_model(reference.config), "Qwen3-MoE", folder, devices={"cuda": "cpu"}, cache="q8_0")
    nothing = [{"match": {"name": "^model$"}, "replace": {"class": "default"}}]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model = optimize_and_load(meta_model(reference.config), nothing, folder, default_device="cpu", cache="f16")
    (one,) = [str(w.message) for w in seen if str(w.message).startswith("cache:")]
    assert "3 of 3 layers do not compute on pages" in one and "not f16" in one
    with torch.inference_mode():
        assert model(random_ids(1, 4), use_cache=True).past_key_values.get_seq_length() == 4
