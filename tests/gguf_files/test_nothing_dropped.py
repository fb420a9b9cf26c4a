"""What a lone .gguf says beside its weights is derived, refused by name, or named in one notice."""

import json
import shutil
import warnings

import gguf
import pytest
import torch
from ktransformers.models import embedded_model
from transformers import AutoTokenizer, GenerationConfig

from ktransformers import config_from_gguf, optimize_and_load, tokenizer_from_gguf
from ktransformers.errors import KTransformersError, UnsupportedError, WeightError
from ktransformers.gguf_files.families import READERS
from ktransformers.gguf_files.write import quantize_folder
from tests.gguf_files.test_families import CONFIGS, model_of
from tests.tiny import meta_model, random_ids, relative_error, tiny_model

GGUF = next(embedded_model().glob("*.gguf"))
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}


def add(source, target, tensors=(), **metadata):
    """A copy of a GGUF file with more tensors and keys, added by the gguf package."""
    reader = gguf.GGUFReader(source)
    kinds = {bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32,
             str: gguf.GGUFValueType.STRING}  # fmt: skip
    arch = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, arch)
    more = {key.replace("ARCH", arch): value for key, value in metadata.items()}
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture" and key not in more:
            sub = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], sub)
    for key, value in more.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            writer.add_key_value(key, value, kinds[type(value)])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, values in dict(tensors).items():
        writer.add_tensor(name, values.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


# --- RoPE -------------------------------------------------------------------------------------------------


def scaled_model(tmp_path, rope, head=16):
    """A Mixtral with `rope`, a file of its weights that says nothing of it, and what its frequencies are divided by."""
    how = dict(num_hidden_layers=2, max_position_embeddings=512, head_dim=head)
    truth = tiny_model("mixtral", rope_parameters=rope, **how)
    plain = tiny_model("mixtral", rope_parameters=PLAIN, **how)
    plain.load_state_dict(truth.state_dict())
    plain.save_pretrained(tmp_path / "hf")
    quantize_folder(tmp_path / "hf", tmp_path / "plain.gguf", "F32")
    return truth, plain.model.rotary_emb.inv_freq / truth.model.rotary_emb.inv_freq


def logits(model, length):
    with torch.no_grad():
        return model(random_ids(1, length)).logits


def lone(path):
    return optimize_and_load(meta_model(config_from_gguf(path)), "Default", path, progress=False)


@pytest.mark.parametrize("head", [16, 64])
@pytest.mark.parametrize("high, original, factor", [(4.0, 64, 8.0), (4.0, 128, 32.0), (2.0, 32, 4.0)])
def test_the_scaling_of_llama_3_1_in_a_tensor(tmp_path, head, high, original, factor):
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": factor, "low_freq_factor": 1.0,
            "high_freq_factor": high, "original_max_position_embeddings": original}  # fmt: skip
    truth, factors = scaled_model(tmp_path, rope, head)
    path = add(tmp_path / "plain.gguf", tmp_path / "m.gguf", {"rope_freqs.weight": factors})
    ours = lone(path)
    assert torch.allclose(ours.model.rotary_emb.inv_freq, truth.model.rotary_emb.inv_freq, rtol=1e-4)
    assert relative_error(logits(ours, 200), logits(truth, 200)) < 1e-3
    if head == 64:
        assert {**rope, **ours.config.rope_parameters} == rope


def test_any_factors_in_a_tensor(tmp_path):
    """Also those that are nobody's formula, and factors of one, which scale nothing."""
    truth, _ = scaled_model(tmp_path, PLAIN)
    path = add(tmp_path / "plain.gguf", tmp_path / "ones.gguf", {"rope_freqs.weight": torch.ones(8)})
    assert config_from_gguf(path).rope_parameters == PLAIN
    factors = torch.tensor([1.0, 3.0, 2.0, 1.5, 1.0, 7.0, 1e30, 2.0])
    path = add(tmp_path / "plain.gguf", tmp_path / "m.gguf", {"rope_freqs.weight": factors})
    ours = lone(path)
    wanted = truth.model.rotary_emb.inv_freq / factors
    assert torch.allclose(ours.model.rotary_emb.inv_freq, wanted)
    truth.model.rotary_emb.inv_freq.copy_(wanted)
    assert relative_error(logits(ours, 200), logits(truth, 200)) < 1e-4


@pytest.mark.parametrize("length", [40, 100])
def test_longrope_in_tensors(tmp_path, length):
    """Short factors up to the length of the training, long ones beyond, as transformers has them."""
    short, long = [1.0 + 0.1 * i for i in range(8)], [1.0 + i for i in range(8)]
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": short, "long_factor": long, "factor": 1.0,
            "original_max_position_embeddings": 64, "attention_factor": 1.25}  # fmt: skip
    truth, _ = scaled_model(tmp_path, rope)
    tensors = {"rope_factors_short.weight": torch.tensor(short), "rope_factors_long.weight": torch.tensor(long)}
    stated = {"ARCH.rope.scaling.original_context_length": 64, "ARCH.rope.scaling.attn_factor": 1.25}
    path = add(tmp_path / "plain.gguf", tmp_path / "m.gguf", tensors, **stated)
    assert relative_error(logits(lone(path), length), logits(truth, length)) < 1e-4
    path = add(tmp_path / "plain.gguf", tmp_path / "half.gguf", {"rope_factors_short.weight": torch.tensor(short)})
    with pytest.raises(WeightError, match="rope_factors_short alone"):
        config_from_gguf(path)


@pytest.mark.parametrize("stated", [
    {"ARCH.rope.scaling.factor": 4.0}, {"ARCH.rope.scale_linear": 4.0},
    {"ARCH.rope.scaling.type": "linear", "ARCH.rope.scaling.factor": 4.0},
])  # fmt: skip
def test_linear_scaling_by_keys_of_any_age(tmp_path, stated):
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    truth, _ = scaled_model(tmp_path, rope)
    path = add(tmp_path / "plain.gguf", tmp_path / "m.gguf", **stated)
    assert relative_error(logits(lone(path), 60), logits(truth, 60)) < 1e-4


REFUSED = {
    "by keys and by tensors": ({"ARCH.rope.scaling.factor": 4.0}, {"rope_freqs.weight": torch.full((8,), 2.0)}, "as well"),
    "another type": ({"ARCH.rope.scaling.type": "swirl"}, {}, "'swirl' is not read yet"),
    "longrope without factors": ({"ARCH.rope.scaling.type": "longrope"}, {}, "no rope_factors"),
    "no positive number": ({}, {"rope_freqs.weight": torch.tensor([1.0, 0.0] * 4)}, "no positive numbers"),
    "layers that differ": ({}, {f"blk.{n}.rope_freqs.weight": torch.full((8,), 2.0 + n) for n in range(2)}, "differs"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_rope_that_cannot_be_derived_is_refused_by_name(tmp_path, case):
    scaled_model(tmp_path, PLAIN)
    stated, tensors, message = REFUSED[case]
    path = add(tmp_path / "plain.gguf", tmp_path / "m.gguf", tensors, **stated)
    with pytest.raises(KTransformersError, match=message):
        config_from_gguf(path)


def test_a_config_that_does_not_scale_what_the_file_does(tmp_path):
    truth, _ = scaled_model(tmp_path, PLAIN)
    path = add(tmp_path / "plain.gguf", tmp_path / "m.gguf", {"rope_freqs.weight": torch.arange(1.0, 9.0)})
    with pytest.raises(WeightError, match="rope_freqs.weight scales RoPE in the GGUF file, the config has rope_type 'default'"):
        optimize_and_load(meta_model(truth.config), "Default", path, progress=False)


# --- keys -------------------------------------------------------------------------------------------------


def complaints(path):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        config_from_gguf(path)
    return [str(warning.message) for warning in told]


READABLE = sorted(name for name in CONFIGS if name not in ("llama4_text", "phimoe", "nemotron_h"))


@pytest.mark.parametrize("family", READABLE)
def test_a_file_of_every_family_is_read_without_a_word(tmp_path, family):
    """Nothing that a converter writes for a family is unknown to its reader."""
    model_of(family).save_pretrained(tmp_path / "hf")
    quantize_folder(tmp_path / "hf", tmp_path / "m.gguf", "F32")
    arch = gguf.GGUFReader(tmp_path / "m.gguf").fields["general.architecture"].contents()
    assert arch in READERS and complaints(tmp_path / "m.gguf") == []


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    """A file of a family that needs few keys, without a tokenizer."""
    root = tmp_path_factory.mktemp("qwen3")
    model_of("qwen3_moe").save_pretrained(root / "hf")
    quantize_folder(root / "hf", root / "m.gguf", "F32")
    return root / "m.gguf"


def test_unknown_keys_are_named_in_one_notice(tmp_path, qwen3):
    path = add(qwen3, tmp_path / "m.gguf", **{"ARCH.new_idea": 3, "ARCH.of.lists": [1, 2], "general.sampling.temp": 0.6,
                                             "general.url": "https://example.org", "quantize.imatrix.file": "x"})  # fmt: skip
    (notice,) = complaints(path)
    assert notice.startswith("m.gguf: not known and not used: qwen3moe.new_idea, qwen3moe.of.lists, general.sampling.temp.")


@pytest.mark.parametrize("key, value, neutral", [
    ("final_logit_softcapping", 30.0, 0.0), ("attention.clamp_kqv", 8.0, 0.0), ("attention.causal", False, True),
    ("expert_gating_func", 2, 1), ("expert_weights_scale", 2.5, 1.0), ("swiglu_clamp_exp", [0.0, 7.0], [0.0, 0.0]),
    ("rope.freq_base_swa", 5.0, None), ("pooling_type", 3, 0), ("expert_group_count", 8, 1),
])  # fmt: skip
def test_keys_that_change_numbers_are_refused_where_a_family_has_no_place_for_them(tmp_path, qwen3, key, value, neutral):
    with pytest.raises(UnsupportedError, match=f"does not compute: qwen3moe.{key} "):
        config_from_gguf(add(qwen3, tmp_path / "m.gguf", **{f"ARCH.{key}": value}))
    assert complaints(add(qwen3, tmp_path / "n.gguf", **{f"ARCH.{key}": neutral})) == []


# --- tokens that end, templates ---------------------------------------------------------------------------


@pytest.mark.parametrize("stated, expected", [(3, [3, 7]), (None, 7), (7, 7)])
def test_a_turn_ends_by_its_text(tmp_path, qwen3, stated, expected):
    """<|im_end|> ends an answer in a file that names another end, or none."""
    texts = [f"w{n}" for n in range(96)]
    texts[7] = "<|im_end|>"
    tokens = {"tokenizer.ggml.tokens": texts, "tokenizer.ggml.token_type": [3 if n == 7 else 1 for n in range(96)]}
    path = add(qwen3, tmp_path / "m.gguf", **{**tokens, "tokenizer.ggml.eos_token_id": stated})
    config = config_from_gguf(path)
    assert config.eos_token_id == expected
    assert GenerationConfig.from_model_config(config).eos_token_id == expected


def test_words_of_a_vocabulary_end_nothing(tmp_path):
    """Only tokens that are never cut from text count; in Harmony's format <|end|> ends a message, not an answer."""
    from ktransformers.gguf_files.special import ends_of_turn

    def ends(*tokens):
        texts, kinds = zip(*tokens, strict=True)
        return list(ends_of_turn({"tokenizer.ggml.tokens": list(texts), "tokenizer.ggml.token_type": list(kinds)}))

    assert ends(("a", 1), ("<|im_end|>", 1), ("<|eot_id|>", 3), ("[EOS]", 4)) == [2, 3]
    assert ends(("<|end|>", 3), ("<|call|>", 3)) == [0, 1]
    assert ends(("<|end|>", 3), ("<|return|>", 3), ("<|call|>", 3)) == [1, 2]
    assert list(ends_of_turn({})) == []


TEMPLATES = {"default": "{{ messages }}", "tool_use": "{{ tools }}", "rag": "{{ documents }}"}


@pytest.mark.parametrize("place", ["list", "files", "one"])
def test_named_templates_survive(tmp_path, place):
    folder = shutil.copytree(embedded_model(), tmp_path / "hf", ignore=shutil.ignore_patterns("*.gguf"))
    expected = TEMPLATES if place != "one" else TEMPLATES["default"]
    (folder / "chat_template.jinja").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    if place == "list":
        settings["chat_template"] = [{"name": name, "template": text} for name, text in TEMPLATES.items()]
    else:
        settings.pop("chat_template", None)
        (folder / "chat_template.jinja").write_text(TEMPLATES["default"])
    if place == "files":
        (folder / "additional_chat_templates").mkdir()
        for name in ("tool_use", "rag"):
            (folder / "additional_chat_templates" / f"{name}.jinja").write_text(TEMPLATES[name])
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert AutoTokenizer.from_pretrained(folder).chat_template == expected
    quantize_folder(folder, tmp_path / "m.gguf", "F16")
    assert tokenizer_from_gguf(tmp_path / "m.gguf").chat_template == expected


def test_several_ends_survive(tmp_path):
    folder = shutil.copytree(embedded_model(), tmp_path / "hf", ignore=shutil.ignore_patterns("*.gguf"))
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": [5, 7]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    done = quantize_folder(folder, tmp_path / "m.gguf", "F16")
    assert config_from_gguf(tmp_path / "m.gguf").eos_token_id[:3] == [5, 7, 9] and done["notices"] == []


def test_ends_that_gguf_has_no_key_for_are_a_notice(tmp_path):
    folder = shutil.copytree(embedded_model(), tmp_path / "hf", ignore=shutil.ignore_patterns("*.gguf"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9, 11, 13]}))
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": 5}
    (folder / "config.json").write_text(json.dumps(config))
    (notice,) = quantize_folder(folder, tmp_path / "m.gguf", "F16")["notices"]
    assert "tokens [11, 13] are not in the file" in notice
    read = config_from_gguf(tmp_path / "m.gguf").eos_token_id
    assert set(read) >= {5, 7, 9} and not {11, 13} & set(read)


def test_keys_of_the_tokenizer_are_named_or_refused(tmp_path):
    bare = {"tokenizer.huggingface.json": None, "tokenizer.ggml.pre": "qwen2"}
    with pytest.warns(UserWarning, match="bare.gguf: not known and not used: tokenizer.ggml.fancy"):
        tokenizer_from_gguf(add(GGUF, tmp_path / "bare.gguf", **bare, **{"tokenizer.ggml.fancy": True}))
    with pytest.raises(UnsupportedError, match="remove_extra_whitespaces is not computed"):
        tokenizer_from_gguf(add(GGUF, tmp_path / "x.gguf", **bare, **{"tokenizer.ggml.remove_extra_whitespaces": True}))
