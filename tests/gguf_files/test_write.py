"""The encoders against the formats and the gguf package, and the program against models, disks and bad
input."""

import json
import resource

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ktransformers.errors import KTransformersError, UnsupportedError, WeightError
from ktransformers.gguf_files import write as program
from ktransformers.gguf_files.write import choose_type, quantize_folder
from ktransformers.loaders import bind, open_weights
from ktransformers.native import encode
from ktransformers.quants.blocks import QUANT_TYPES, dequantize
from ktransformers.quants.encode import quantize
from tests.loaders import small_files

ENCODED = ["Q8_0", "Q4_K", "Q5_K", "Q6_K"]


def relative_error(x, kind):
    back = dequantize(quantize(x, kind), kind, tuple(x.shape))
    return float((back - x).square().mean().sqrt() / x.square().mean().sqrt())


def rounded_to_the_widest(x, kind):
    """The plain encoder: the scale that just holds the widest weight of each sub-block, then rounding."""
    if kind == "Q6_K":
        blocks = x.view(-1, 16, 16)
        scale = blocks.abs().amax(-1, keepdim=True) / 31
        unit = (scale.amax(1, keepdim=True) / 127).half().float()
        scale = (scale / unit).round() * unit
        return ((blocks / scale).round().clamp(-32, 31) * scale).view_as(x)
    top = 15 if kind == "Q4_K" else 31
    blocks = x.view(-1, 8, 32)
    low = blocks.amin(-1, keepdim=True).clamp(max=0)
    scale, shift = (blocks.amax(-1, keepdim=True) - low) / top, -low
    units = [(v.amax(1, keepdim=True) / 63).half().float() for v in (scale, shift)]
    scale, shift = ((v / unit).round() * unit for v, unit in zip((scale, shift), units, strict=True))
    return (((blocks + shift) / scale).round().clamp(0, top) * scale - shift).view_as(x)


# --- encoders -----------------------------------------------------------------------------------------------


def test_q8_0_is_the_gguf_packages():
    """Q8_0 blocks are those of the gguf package, byte for byte: ties, zeros and extremes included."""
    torch.manual_seed(0)
    x = torch.randn(64, 256)
    x[0] = 0
    x[1, ::2] = 127 * 0.25  # ties: every other weight lies between two codes
    x[1, 1::2] = 0.125
    x[2] = -x[1]
    x[3] *= 1e-9
    theirs = gguf.quantize(x.numpy(), gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(quantize(x, "Q8_0").numpy(), theirs)


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
@pytest.mark.parametrize("shape", ["normal", "laplace", "uniform", "outlier"])
def test_search_beats_rounding(kind, shape):
    """The searched scales lower the error well below that of scales taken from the widest weight."""
    torch.manual_seed(0)
    x = {
        "normal": torch.randn(32, 512),
        "laplace": torch.distributions.Laplace(0.0, 1.0).sample((32, 512)),
        "uniform": torch.rand(32, 512) - 0.5,
        "outlier": torch.randn(32, 512) * (1 + 30 * (torch.rand(32, 512) > 0.995)),
    }[shape] * 0.02  # fmt: skip
    plain = rounded_to_the_widest(x, kind)
    plain_error = float((plain - x).square().mean().sqrt() / x.square().mean().sqrt())
    assert relative_error(x, kind) < (0.97 if shape == "outlier" else 0.93) * plain_error


@pytest.mark.parametrize("kind, bound", [("Q8_0", 0.006), ("Q6_K", 0.018), ("Q5_K", 0.036), ("Q4_K", 0.073)])
def test_error_of_normal_weights(kind, bound):
    """The relative error on normally distributed weights stays within what each format allows."""
    torch.manual_seed(0)
    assert relative_error(torch.randn(32, 512), kind) < bound


@pytest.mark.parametrize("kind", ENCODED)
def test_gguf_decodes_what_we_encode(kind):
    """The gguf package decodes our blocks to the numbers that we do."""
    torch.manual_seed(0)
    x = torch.randn(4, 512)
    packed = quantize(x, kind)
    theirs = gguf.dequantize(packed.numpy(), gguf.GGMLQuantizationType[kind])
    assert torch.equal(dequantize(packed, kind, (4, 512)), torch.from_numpy(theirs))


@pytest.mark.parametrize("kind", ENCODED)
@pytest.mark.parametrize("fill", [0.0, 1.0, -1.0, 1e-30, -1e-6, 1000.0])
def test_constant_blocks(kind, fill):
    """Blocks of one value, zero and values too small for fp16 scales included, come back finite and near."""
    x = torch.full((2, 256), fill)
    back = dequantize(quantize(x, kind), kind, (2, 256))
    assert bool(back.isfinite().all())
    assert torch.allclose(back, x, rtol=0.02, atol=6e-6)


@pytest.mark.parametrize("kind", ENCODED)
def test_nasty_blocks(kind):
    """One large weight among zeros, only positive and only negative weights keep their large values."""
    torch.manual_seed(0)
    x = torch.zeros(4, 256)
    x[0, 7] = 3.0
    x[1, 100] = -3.0
    x[2] = torch.rand(256) + 1
    x[3] = -torch.rand(256) - 1
    back = dequantize(quantize(x, kind), kind, (4, 256))
    assert torch.allclose(back, x, atol=0.15)  # Q4_K has no positive minimum: 16 steps from 0 to 2
    assert torch.allclose(back[:2], x[:2], atol=0.02)


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_chunks_do_not_change_the_blocks(kind, monkeypatch):
    """A tensor encoded in several chunks has the bytes of one encoded at once."""
    from ktransformers.quants import encode

    x = torch.randn(7, 256)
    whole = quantize(x, kind)
    monkeypatch.setattr(encode, "WEIGHTS_AT_ONCE", 512)
    assert torch.equal(quantize(x, kind), whole)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_plain_types(kind):
    """Plain types round as torch does, from any float type and layout."""
    x = torch.randn(6, 4).double().t()
    packed = quantize(x, kind)
    assert packed.shape == (4, 6 * QUANT_TYPES[kind].nbytes)
    assert torch.equal(packed.view(QUANT_TYPES[kind].torch_dtype), x.to(QUANT_TYPES[kind].torch_dtype))


def test_what_cannot_be_encoded():
    """Broken rows, NaN, numbers beyond fp16 and formats without an encoder are refused by name."""
    x = torch.ones(2, 256)
    with pytest.raises(WeightError, match="256"):
        quantize(torch.ones(2, 100), "Q4_K")
    with pytest.raises(WeightError, match="NaN"):
        quantize(x * float("nan"), "Q4_K")
    for kind in ENCODED:
        with pytest.raises(WeightError, match="too large"):
            quantize(x * 1e30, kind)
    with pytest.raises(WeightError, match="F16.*too large"):
        quantize(x * 1e6, "F16")
    with pytest.raises(UnsupportedError, match="IQ4_XS.*Q4_K"):
        quantize(x, "IQ4_XS")


# --- the program --------------------------------------------------------------------------------------------


def test_mix_of_q4_k_m():
    """Q4_K_M gives Q6_K to the output and to half the value and down projections, F32 to vectors and
    routers."""

    def choose(name, shape=(256, 256), tied=False):
        return choose_type(name, shape, "Q4_K_M", 8, tied).name

    assert choose("output.weight") == "Q6_K"
    assert (choose("token_embd.weight"), choose("token_embd.weight", tied=True)) == ("Q4_K", "Q6_K")
    for part in ("attn_v", "ffn_down", "ffn_down_exps", "ffn_down_shexp", "attn_v_b"):
        kinds = [choose(f"blk.{i}.{part}.weight") for i in range(8)]
        assert kinds == ["Q6_K", "Q4_K", "Q4_K", "Q6_K", "Q4_K", "Q4_K", "Q6_K", "Q6_K"], part
    assert choose("blk.0.attn_q.weight") == "Q4_K"
    assert choose("blk.0.ffn_gate_inp.weight") == choose("blk.0.attn_norm.weight", (256,)) == "F32"
    assert choose("blk.0.attn_k_b.weight", (4, 512, 128)) == "Q8_0"
    assert choose("blk.0.attn_k_b.weight", (4, 512, 24)) == "F16"


WIDE = dict(hidden_size=256, intermediate_size=256, moe_intermediate_size=256)


def test_mixes_of_fewer_bits():
    """As llama.cpp mixes them: more for values and down projections, Q6_K for the output, and for narrow rows the type
    nearest in size that has them."""

    def choose(mix, name, shape=(256, 256)):
        return choose_type(f"blk.{name}.weight" if name[0].isdigit() else name, shape, mix, 16, False).name

    for mix in ("Q2_K", "Q3_K_M", "Q4_0", "IQ4_XS", "IQ4_NL"):
        assert choose(mix, "output.weight") == "Q6_K" and choose(mix, "3.attn_q") == mix.removesuffix("_M")
    assert [choose("Q2_K", f"5.{part}") for part in ("attn_v", "ffn_down_exps", "attn_output")] == ["Q4_K", "Q3_K", "Q3_K"]
    assert [choose("Q3_K_M", f"{i}.attn_v") for i in (0, 1, 2)] == ["Q5_K", "Q5_K", "Q4_K"]
    assert [choose("Q3_K_M", f"{i}.ffn_down") for i in (0, 1, 2, 4, 15)] == ["Q5_K", "Q4_K", "Q3_K", "Q4_K", "Q4_K"]
    assert [choose("IQ4_XS", f"{i}.ffn_down") for i in (1, 2)] == ["Q5_K", "IQ4_XS"]
    assert [choose("Q3_K_M", "9.attn_q", (8, width)) for width in (96, 50)] == ["IQ4_NL", "F16"]
    assert choose("Q4_0", "9.attn_q", (8, 96)) == "Q4_0" and choose("Q4_K_M", "9.attn_q", (8, 96)) == "Q8_0"


def test_fewer_bits_move_the_logits_further(tmp_path):
    """A tiny model's logits come closer with every type that has more bits."""
    from tests.tiny import random_ids, relative_error

    model = small_files.model("qwen3_moe", **WIDE, num_experts_per_tok=4)  # all: no choice that a small error turns over
    model.save_pretrained(tmp_path / "hf")
    ids, errors = random_ids(1, 24, vocab=model.config.vocab_size), {}
    with torch.no_grad():
        truth = model(ids).logits
        for mix in ("Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "F32"):
            quantize_folder(tmp_path / "hf", tmp_path / f"{mix}.gguf", mix)
            weights = bind(open_weights(tmp_path / f"{mix}.gguf"), small_files.meta("qwen3_moe", **WIDE, num_experts_per_tok=4))
            model.load_state_dict({name: weights.tensor(name, dtype=torch.float32) for name in model.state_dict()})
            errors[mix] = relative_error(model(ids).logits, truth)
    assert list(errors.values()) == sorted(errors.values(), reverse=True), errors
    assert errors["Q2_K"] < 0.6 and errors["Q6_K"] < 0.05 and errors["F32"] < 1e-5, errors


def test_without_the_c_library(folder, tmp_path, monkeypatch):
    """The error says what to do, before anything is read."""
    monkeypatch.setattr(program, "available", lambda: False)
    fails_and_leaves_nothing(folder, tmp_path / "m.gguf", "not built.*make setup")


@pytest.mark.parametrize("mix", ["Q2_K", "Q3_K_M", "Q4_0", "IQ4_XS", "IQ4_NL", "Q4_K_M", "Q5_K_M", "Q6_K", "F16"])
def test_round_trip(mix, tmp_path):
    """A model quantized by the program, read back through the loaders, is near the original everywhere."""
    model = small_files.model("deepseek_v3", **WIDE)
    model.save_pretrained(tmp_path / "hf")
    done = quantize_folder(tmp_path / "hf", tmp_path / "m.gguf", mix)
    if mix not in ("Q6_K", "F16"):
        assert {"F32", "Q6_K", mix.removesuffix("_M")} <= set(done["types"])
    meta = small_files.meta("deepseek_v3", **WIDE)
    weights = bind(open_weights(tmp_path / "m.gguf"), meta)
    assert weights.problems(small_files.expected(meta)) == []
    bound = {"Q2_K": 0.3, "Q3_K_M": 0.17, "Q4_0": 0.09, "IQ4_XS": 0.08, "IQ4_NL": 0.08, "Q4_K_M": 0.08, "Q5_K_M": 0.04,
             "Q6_K": 0.02, "F16": 1e-3}  # fmt: skip
    for name, tensor in model.state_dict().items():
        back = weights.tensor(name, dtype=torch.float32)
        error = float((back - tensor).norm() / tensor.norm())
        assert error < bound[mix], (name, error)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType[f"MOSTLY_{mix}"].value


@pytest.mark.parametrize("family", small_files.FAMILIES)
def test_metadata(family, tmp_path):
    """The keys that llama.cpp requires of each family are there with the config's numbers."""
    model = small_files.model(family)
    model.save_pretrained(tmp_path / "hf")
    quantize_folder(tmp_path / "hf", tmp_path / "m.gguf", "F32")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    arch = fields["general.architecture"].contents()
    found = {k.removeprefix(f"{arch}."): f.contents() for k, f in fields.items()}
    config = model.config
    common = {
        "context_length": 128, "embedding_length": 64, "block_count": 2, "feed_forward_length": 96,
        "attention.head_count": 4, "expert_count": 4, "expert_used_count": 2, "vocab_size": 80,
        "general.file_type": 0, "general.quantization_version": 2,
    }  # fmt: skip
    mla = {
        "attention.head_count_kv": 1, "attention.key_length": 40, "attention.value_length": 32,
        "attention.key_length_mla": 24, "attention.value_length_mla": 24, "attention.kv_lora_rank": 32,
        "rope.dimension_count": 8, "leading_dense_block_count": 1, "expert_shared_count": 1,
        "expert_feed_forward_length": 32,
        "expert_weights_scale": config.to_dict().get("routed_scaling_factor"),
    }  # fmt: skip
    expected = common | {
        "deepseek_v2": mla | {"expert_gating_func": 1, "expert_weights_norm": False},
        "deepseek_v3": mla | {"expert_gating_func": 2, "expert_weights_norm": True, "expert_group_count": 2,
                              "expert_group_used_count": 1, "attention.q_lora_rank": 48},
        "qwen2_moe": {"expert_feed_forward_length": 32, "expert_shared_feed_forward_length": 64,
                      "attention.head_count_kv": 2},
        "qwen3_moe": {"expert_feed_forward_length": 32, "attention.key_length": 32,
                      "attention.head_count_kv": 2},
        "mixtral": {"rope.dimension_count": 16, "attention.head_count_kv": 2},
    }[family]  # fmt: skip
    assert {k: found.get(k) for k in expected} == expected
    assert found["rope.freq_base"] == config.rope_parameters["rope_theta"]
    assert found["attention.layer_norm_rms_epsilon"] == np.float32(config.rms_norm_eps)
    assert ("attention.q_lora_rank" in found) == (family == "deepseek_v3")


def byte_tokenizer():
    """The 256 byte letters in order, and a tokenizer of them, with one merge and one special token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate([*alphabet, "Ġa"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("Ġ", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return alphabet, tokenizer


def save_tokenizer(folder, pre=None):
    """A byte-level BPE tokenizer of a few tokens, one of them special, written as tokenizer.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {"a": 0, "b": 1, "Ġ": 2, "ab": 3, "Ġab": 4}
    tokenizer = Tokenizer(models.BPE(vocab, [("a", "b"), ("Ġ", "ab")]))
    tokenizer.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save(str(folder / "tokenizer.json"))


def test_tokenizer(tmp_path):
    """Tokens, kinds, merges, special ids and the chat template of the folder are in the file."""
    model = small_files.model("qwen3_moe", eos_token_id=5)
    model.save_pretrained(tmp_path / "hf")
    save_tokenizer(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    (tmp_path / "hf" / "chat_template.jinja").write_text("{{ messages }}")
    done = quantize_folder(tmp_path / "hf", tmp_path / "m.gguf", "F32")
    assert done["notices"] == []
    found = {k: f.contents() for k, f in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
    assert found["tokenizer.ggml.model"] == "gpt2" and found["tokenizer.ggml.pre"] == "gpt-2"
    tokens, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == 80
    assert tokens[:8] == ["a", "b", "Ġ", "ab", "Ġab", "<|end|>", "<tool>", "[PAD7]"]
    assert kinds[:8] == [1, 1, 1, 1, 1, 3, 4, 5]
    assert found["tokenizer.ggml.merges"] == ["a b", "Ġ ab"]
    assert found["tokenizer.ggml.eos_token_id"] == 5 and found["tokenizer.ggml.add_bos_token"] is False
    assert found["tokenizer.chat_template"] == "{{ messages }}"


def test_other_tokenizers_are_a_notice(tmp_path):
    """A tokenizer that is not byte-level BPE is left out, and the summary says so."""
    from tokenizers import pre_tokenizers

    small_files.model("qwen3_moe").save_pretrained(tmp_path / "hf")
    save_tokenizer(tmp_path / "hf", pre_tokenizers.Whitespace())
    done = quantize_folder(tmp_path / "hf", tmp_path / "m.gguf", "F32")
    assert "not a byte-level BPE" in done["notices"][0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "hf"
    small_files.model("qwen3_moe").save_pretrained(path)
    return path


def test_requantizing_a_gguf(folder, tmp_path):
    """A folder whose weights are GGUF is a source as well."""
    quantize_folder(folder, tmp_path / "a.gguf", "F32")
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "a.gguf").rename(tmp_path / "src" / "a.gguf")
    quantize_folder(tmp_path / "src", tmp_path / "b.gguf", "F32")
    a, b = open_weights(tmp_path / "src"), open_weights(tmp_path / "b.gguf")
    assert a.names() == b.names() and all(torch.equal(a.tensor(n), b.tensor(n)) for n in a.names())


def fails_and_leaves_nothing(source, out, match, **kwargs):
    before = set(out.parent.iterdir())
    with pytest.raises(KTransformersError, match=match) as caught:
        quantize_folder(source, out, **kwargs)
    assert set(out.parent.iterdir()) == before
    return str(caught.value)


def test_full_disk(folder, tmp_path, monkeypatch):
    """When the disk is full, before or in the middle of writing, one error says so and no file is left."""
    out = tmp_path / "m.gguf"
    usage = type("usage", (), {"free": 1000})
    with monkeypatch.context() as patch:
        patch.setattr(program.shutil, "disk_usage", lambda _: usage)
        fails_and_leaves_nothing(folder, out, "GB are needed, 0.00 GB are free", mix="F32")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for limit in (50, 3000, 100_000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            text = fails_and_leaves_nothing(folder, out, "writing failed", mix="F32")
            assert str(out) in text and "nothing was left behind" in text
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_an_existing_file_survives_failure(folder, tmp_path, monkeypatch):
    """A failed run leaves the file that was there before as it was; a good run replaces it."""
    out = tmp_path / "m.gguf"
    out.write_bytes(b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(program, "_packed", fail)
        fails_and_leaves_nothing(folder, out, "No space left")
    assert out.read_bytes() == b"old"
    quantize_folder(folder, out, "Q8_0")
    assert open_weights(out).names()


def test_bad_sources(folder, tmp_path):
    """Folders without config, without weights, of an unknown family, or with damaged weights are named."""
    out, source = tmp_path / "m.gguf", tmp_path / "src"
    source.mkdir()
    fails_and_leaves_nothing(source, out, "no config.json")
    (source / "config.json").write_text("{")
    fails_and_leaves_nothing(source, out, "config.json: cannot be used")
    (source / "config.json").write_text('{"model_type": "gpt2"}')
    fails_and_leaves_nothing(source, out, "'gpt2' models are not known.*qwen3_moe")
    (source / "config.json").write_bytes((folder / "config.json").read_bytes())
    fails_and_leaves_nothing(source, out, "without weights")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, source / "model.safetensors")
    quantize_folder(source, tmp_path / "plain.gguf", "F32")  # a plain type keeps what is there
    (tmp_path / "plain.gguf").unlink()
    tensors["model.layers.1.mlp.experts.2.up_proj.weight"][3] = float("nan")
    save_file(tensors, source / "model.safetensors")
    fails_and_leaves_nothing(source, out, "blk.1.ffn_up_exps.weight: .*NaN", mix="Q8_0")
    del tensors["model.norm.weight"], tensors["lm_head.weight"]
    save_file(tensors, source / "model.safetensors")
    fails_and_leaves_nothing(source, out, "(?s)model.norm.weight: missing.*lm_head.weight: missing")
    fails_and_leaves_nothing(folder, tmp_path / "m.bin", "NAME.gguf")


@pytest.mark.parametrize("place", ["_packed", "publish"])
def test_ctrl_c_leaves_nothing(place, folder, tmp_path, monkeypatch):
    """Files and folders made so far are gone."""

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(program, place, interrupt)
    with pytest.raises(KeyboardInterrupt):
        quantize_folder(folder, tmp_path / "new" / "deep" / "m.gguf", "Q8_0")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_between_the_parts_of_a_split_leaves_none(folder, tmp_path, monkeypatch):
    """A set of files appears whole or not at all."""
    replace, moved = program.Path.replace, []
    last = tmp_path / "m-00003-of-00003.gguf"
    last.write_bytes(b"old")

    def second_fails(path, target):
        moved.append(target)
        if len(moved) == 2:
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(program.Path, "replace", second_fails)
    with pytest.raises(KeyboardInterrupt):
        quantize_folder(folder, tmp_path / "m.gguf", "Q8_0", split=10)
    assert len(moved) == 2 and list(tmp_path.iterdir()) == [last] and last.read_bytes() == b"old"


def test_negative_split_is_refused(folder, tmp_path):
    """`--split -1` is an error, not one file per tensor."""
    fails_and_leaves_nothing(folder, tmp_path / "m.gguf", "--split -1: expected 0", split=-1)


def test_a_field_of_the_wrong_type_in_the_config(folder, tmp_path):
    """transformers' validation errors become one line that names the field."""
    config = json.loads((folder / "config.json").read_text()) | {"hidden_size": "x"}
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "config.json").write_text(json.dumps(config))
    text = fails_and_leaves_nothing(tmp_path / "src", tmp_path / "m.gguf", "config.json: cannot be used")
    assert "'hidden_size' expected int, got str" in text and len(text.splitlines()) == 1


def test_halves_are_encoded_as_they_are(tmp_path, monkeypatch):
    """Experts too: bf16 is not made fp32 on the way, and the same numbers in fp32 give the same tensors."""
    seen = []
    monkeypatch.setattr(program, "encode", lambda x, *rest: seen.append((x.dtype, x.dim())) or encode(x, *rest))
    model, tensors = small_files.model("qwen3_moe").bfloat16(), []
    for dtype in (torch.bfloat16, torch.float32):
        folder, out = tmp_path / str(dtype), tmp_path / f"{dtype}.gguf"
        model.to(dtype).save_pretrained(folder)
        quantize_folder(folder, out, "Q8_0")
        assert {found for found, dims in seen if dims > 1} == {dtype}
        tensors.append({tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors})
        seen.clear()
    half, whole = tensors
    assert all(np.array_equal(half[name].data, whole[name].data) for name in whole if half[name].tensor_type == whole[name].tensor_type)
    assert any("exps" in name and half[name].tensor_type == whole[name].tensor_type for name in whole)
