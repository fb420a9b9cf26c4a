"""The second walk: every model with experts that takes more than text, as published, under the rule file for any of them.

The table is tests/multimodal.py. Text goes in and text comes out; what sees and hears is transformers' own, loaded and
placed with the rest.
"""

import functools
import shutil

import pytest
import torch
from ktransformers.models import DEFAULT_RULES, builder, embedded_model
from ktransformers.models.traits import find_layers, layer_of
from transformers import AutoConfig, AutoModelForImageTextToText
from typer.testing import CliRunner

from ktransformers import KTConfig, optimize_and_load, plan
from ktransformers.cli import app
from ktransformers.configs import meta_model, read_config
from ktransformers.engine.generate import generate
from ktransformers.engine.load import load
from ktransformers.engine.sampling import Sampling
from ktransformers.errors import UnsupportedError
from ktransformers.gguf_files.write import quantize_folder
from ktransformers.operators.base_operator import BaseInjectedModule
from ktransformers.operators.experts import KTransformersExperts
from ktransformers.planner import formats, sizes
from ktransformers.simulator.simulate import simulate
from tests import multimodal
from tests.operators.test_every_family import in_pieces, rules
from tests.tiny import build, random_ids, randomize, relative_error, save

CPU = {"cuda": "cpu"}
PROMPT = random_ids(1, 11)


@functools.cache
def reference(model_type):
    """transformers' own model: random weights, its plainest path."""
    torch.manual_seed(0)
    return randomize(multimodal.build(model_type, attn_implementation="eager", experts_implementation="eager").eval())


def loaded(model_type, rule, folder):
    """Ours, of the same class, from the checkpoint that transformers writes."""
    save(reference(model_type), folder)
    with torch.device("meta"):
        model = multimodal.build(model_type)
    return optimize_and_load(model, rule, folder, devices=CPU, progress=False)


WALK = [(model_type, "Default") for model_type in multimodal.known_here()]
WALK += [(model_type, DEFAULT_RULES[model_type]) for model_type in multimodal.known_here() if model_type in DEFAULT_RULES]


@pytest.mark.parametrize(("model_type", "rule"), WALK)
def test_text_in_and_text_out_as_transformers_has_it(model_type, rule, tmp_path):
    """Logits, a prefill in pieces by hand and by `generate`, and 32 greedy tokens."""
    truth, op = reference(model_type), multimodal.operator_of(model_type)
    model = loaded(model_type, rule if op == "KExpertsCPU" else rules(op), tmp_path)
    ours = [module for module in model.modules() if isinstance(module, KTransformersExperts)]
    assert ours and {type(module.active).__name__ for module in ours} == {op}
    with torch.no_grad():
        expected = truth(PROMPT).logits
        assert relative_error(model(PROMPT).logits, expected) < 1e-4
        assert relative_error(in_pieces(model, PROMPT), in_pieces(truth, PROMPT)) < 1e-4
    expected = truth.generate(PROMPT, max_new_tokens=32, do_sample=False)
    assert torch.equal(model.generate(PROMPT, max_new_tokens=32, do_sample=False), expected)
    tokens = list(generate(model, PROMPT[0].tolist(), max_new_tokens=8, chunk_size=4, sampling=Sampling()))
    assert tokens == expected[0, 11:19].tolist()


@pytest.mark.parametrize("model_type", multimodal.IMAGES)
def test_an_image_is_seen_as_transformers_sees_it(model_type, tmp_path):
    truth = reference(model_type)
    model = loaded(model_type, DEFAULT_RULES[model_type], tmp_path)
    ours = [name for name, module in model.named_modules() if isinstance(module, BaseInjectedModule)]
    assert not any(word in name for name in ours for word in ("vis", "projector"))  # these stay transformers' own
    token = getattr(truth.config, "image_token_id", None) or truth.config.image_token_index
    ids = torch.tensor([[5, getattr(truth.config, "vision_start_token_id", 7), *[token] * 4, 9, 11, 13]])
    shape, more = multimodal.IMAGES[model_type]
    image = {"pixel_values": torch.randn(shape, generator=torch.Generator().manual_seed(3))}
    image |= {"image_grid_thw": torch.tensor([[1, 4, 4]])} if "grid" in more else {}
    image |= {"mm_token_type_ids": (ids == token).int()} if "types" in more else {}
    with torch.no_grad():
        expected = truth(ids, **image).logits
        assert relative_error(expected, truth(ids.where(ids != token, 6)).logits) > 0.1  # the image counts
        assert relative_error(model(ids, **image).logits, expected) < 1e-4
    expected = truth.generate(ids, max_new_tokens=8, do_sample=False, **image)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False, **image), expected)


@pytest.mark.parametrize("model_type", ["qwen3_vl_moe", "llama4"])
def test_from_pretrained_makes_the_same_model(model_type, tmp_path):
    folder, rule = save(reference(model_type), tmp_path), DEFAULT_RULES[model_type]
    given = KTConfig(rule, devices=CPU, progress=False)
    model = AutoModelForImageTextToText.from_pretrained(folder, quantization_config=given)
    assert any(isinstance(module, KTransformersExperts) for module in model.modules())
    with torch.no_grad():
        assert relative_error(model(PROMPT).logits, reference(model_type)(PROMPT).logits) < 1e-4


def test_what_thinks_of_a_model_that_speaks(tmp_path):
    """Qwen3-Omni's folder holds a thinker, a talker and a vocoder; the thinker is the language model."""
    torch.manual_seed(0)
    whole = randomize(multimodal.build("qwen3_omni_moe", attn_implementation="eager").eval())
    config = read_config(save(whole, tmp_path))
    model = meta_model(config)
    assert type(model) is type(whole.thinker)
    optimize_and_load(model, DEFAULT_RULES[config.model_type], devices=CPU, progress=False)
    with torch.no_grad():
        assert relative_error(model(PROMPT).logits, whole.thinker(PROMPT).logits) < 1e-4


def test_a_gguf_is_refused_by_the_parts_that_it_lacks(checkpoint, tmp_path):
    quantize_folder(checkpoint("qwen3_moe")[1], tmp_path / "m.gguf", "F16")
    model = meta_model(multimodal.config_of("qwen3_vl_moe"))
    message = r"m.gguf: a GGUF file holds a language model alone, and Qwen3VLMoeFor.* also has model.visual\. Use"
    with pytest.raises(UnsupportedError, match=message):
        optimize_and_load(model, "Default", tmp_path / "m.gguf", devices=CPU, progress=False)


@pytest.mark.parametrize("model_type", ["dots3_note", "kimi_k25", "llama4", "muse_spark", "qwen3_vl_moe"])
def test_two_gpus_play_it_without_a_tensor_on_the_wrong_one(model_type):
    """Text through a model whose layers are on two GPUs; what sees is with the first layer."""
    with torch.device("meta"):
        model = multimodal.build(model_type)
    found = simulate(model, DEFAULT_RULES.get(model_type, "Default"), gpus=2, tokens=8)
    assert not found.problems
    placed = plan(model, DEFAULT_RULES.get(model_type, "Default"), gpus=2)
    sees = {str(placed[name].device) for name in placed if "vis" in name and "vision_moe" not in name}
    assert sees == {"cuda:0"} or sees == {"cuda:0", "cpu"} and model_type == "dots3_note"  # its eye has experts


def test_parts_that_text_passes_by_take_memory_and_no_time():
    model = meta_model(multimodal.config_of("qwen3_vl_moe"))
    found = sizes.parts(model, plan(model, "Default", gpus=0), formats.named_format("BF16", 2, False))
    seen = [part for part in found if ".visual." in part.name]
    assert sum(part.weights for part in found) == sum(p.numel() for p in model.parameters())
    assert seen and all(part.layer is None and part.held and not part.read and not part.ops for part in seen)
    assert [cache.layer for cache in sizes.caches(model)] == [0, 1]


def test_layers_are_the_decoders():
    with torch.device("meta"):
        model = multimodal.build("qwen3_vl_moe", vision_config={"depth": 40, "hidden_size": 64})
    sizes = {name: sum(p.numel() for p in model.get_submodule(name).parameters()) for name in ("model.visual", "model.language_model")}
    assert sizes["model.visual"] > sizes["model.language_model"]
    assert find_layers(model)[0] == "model.language_model.layers"
    names = {"model.layers.3.mlp": 3, "model.visual.blocks.3.attn": None, "model.language_model.layers.1.mlp.vision_moe": 1}
    assert {name: layer_of(name) for name in names} == names


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    """A Qwen3-VL-MoE of the embedded model's vocabulary, with its tokenizer and chat template."""
    folder = tmp_path_factory.mktemp("vl")
    torch.manual_seed(0)
    vocabulary = AutoConfig.from_pretrained(embedded_model()).vocab_size
    config = multimodal.config_of("qwen3_vl_moe", text_config={"vocab_size": vocabulary + 16, "max_position_embeddings": 40})
    save(randomize(build(config).eval()), folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(embedded_model() / name, folder)
    return folder


def test_the_engine_loads_a_folder(chat_folder):
    model, tokenizer = load(str(chat_folder), devices=CPU)
    assert type(model).__name__ == "Qwen3VLMoeForConditionalGeneration" and tokenizer.chat_template
    assert any(isinstance(module, KTransformersExperts) for module in model.modules())


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["plan", "MODEL"], "routed experts"),
        (["rules", "explain", "Qwen3-VL-MoE", "MODEL", "--gpus", "2"], "model.language_model.layers"),
        (["simulate", "Qwen3-VL-MoE", "MODEL", "--gpus", "2"], "1 sequence of 64 tokens"),
    ],
)
def test_the_program_takes_such_a_folder(chat_folder, command, expected):
    ran = CliRunner().invoke(app, [str(chat_folder) if word == "MODEL" else word for word in command])
    assert ran.exit_code == 0, ran.output
    assert expected in ran.output


def test_chat_keeps_to_the_context_of_the_language_model(chat_folder):
    question = "How are you today, and how is everybody else? " * 8
    ran = CliRunner().invoke(app, ["chat", str(chat_folder), "--json", "--devices", "cuda=cpu"], input=f"hi\n{question}\n")
    assert '"answer"' in ran.stdout and "the model takes 40 in all" in ran.output


def test_the_class_that_builds_a_config():
    """A causal LM where there is one, else the class that takes images or sounds."""
    expected = {
        "qwen3_moe": "Qwen3MoeForCausalLM",
        "llama4": "Llama4ForCausalLM",
        "qwen3_5_moe": "Qwen3_5MoeForCausalLM",
        "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
        "mistral4": "Mistral4ForCausalLM",
        "nemo_speechlm": "Nemotron3_5TranscribeForConditionalGeneration",
    }
    found = {name: type(meta_model(multimodal.config_of(name))).__name__ for name in expected}
    assert found == expected


@pytest.mark.parametrize("model_type", multimodal.WITHOUT)
def test_models_that_do_not_continue_text_are_refused_by_name(model_type):
    config = AutoConfig.for_model(model_type)
    assert builder(config) is None
    with pytest.raises(UnsupportedError, match=f"no model of type '{model_type}' that continues text"):
        meta_model(config)


def test_every_type_with_experts_is_in_a_table():
    """Fails when a release of transformers brings a model that nobody looked at, or takes one away."""
    found, tables = set(multimodal.types_with_experts()), multimodal.FAMILIES | multimodal.BY_PART | multimodal.WITHOUT
    assert not found - tables.keys(), (
        f"transformers has experts in {', '.join(sorted(found - tables.keys()))}: found in no table of "
        "tests/multimodal.py. Add each to FAMILIES, with what SIZES does not shrink, and run this file; or to WITHOUT."
    )
    generic = {name for name, fields in multimodal.FAMILIES.items() if "model_type" in fields.get("text_config", {})}
    assert tables.keys() - generic == found
