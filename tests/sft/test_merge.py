"""`kt merge`: what was merged computes what base and adapter compute, in every family, from and into both formats."""

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from ktransformers import cli, config_from_gguf, optimize_and_load
from ktransformers.errors import UnsupportedError, WeightError
from ktransformers.gguf_files.lora import peft_to_gguf
from ktransformers.gguf_files.write import quantize_folder
from ktransformers.loaders import open_weights
from ktransformers.sft.merge import merge
from tests.gguf_files.test_families import CONFIGS, NO_OPERATORS, model_of
from tests.gguf_files.test_lora import LINEARS, adapted, logits
from tests.gguf_files.test_write import byte_tokenizer
from tests.loaders import published
from tests.loaders.small_files import edit_gguf
from tests.operators import test_published_checkpoints as published_checkpoints
from tests.tiny import meta_model, relative_error, save, tiny_model

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")


BYTES = {"vocab_size": 300, "eos_token_id": 257}
"""Room for the tokenizer of bytes."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Call with a family: (a folder with hf/, peft/ and m.gguf of F32, the base, the adapted model's logits)."""
    known = {}

    def make(model_type="qwen3_moe", **config):
        key = json.dumps([model_type, config])
        if key not in known:
            folder = tmp_path_factory.mktemp(model_type)
            base = model_of(model_type, **BYTES)
            base.save_pretrained(folder / "hf")
            byte_tokenizer()[1].save(str(folder / "hf" / "tokenizer.json"))
            model = adapted(base, **config)
            model.save_pretrained(folder / "peft")
            quantize_folder(folder / "hf", folder / "m.gguf", "F32")
            known[key] = folder, base, logits(model)
        return known[key]

    return make


SCANS = {"qwen3_next", "qwen3_5_moe_text"}
"""Families whose linear attention multiplies rounding: PEFT's own merge_and_unload is as far from the adapter's logits."""


def targets(model_type):
    """kv_b_proj besides, which only merging can do."""
    return {"target_modules": [*LINEARS, "kv_b_proj"]} if "kv_lora_rank" in CONFIGS[model_type] else {}


def of_path(path):
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32).eval()


def of_folder(path):
    return logits(of_path(path))


def of_gguf(path, config=None, vocab=96):
    config = config or config_from_gguf(path)
    return logits(optimize_and_load(meta_model(config), NO_OPERATORS, path, progress=False), vocab)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_every_family_from_and_into_both_formats(made, model_type, tmp_path):
    folder, base, expected = made(model_type, **targets(model_type))
    assert relative_error(logits(base), expected) > 1e-3
    limit = 3e-4 if model_type in SCANS else 1e-5
    for weights in ("", folder / "m.gguf"):
        given = {"base": folder / "hf", "adapter": folder / "peft", "weights": weights}
        done = merge(**given, out=tmp_path / "out.gguf")
        assert relative_error(of_gguf(tmp_path / "out.gguf", base.config), expected) < max(limit, 1e-4)  # as test_families
        assert done["all"]["error"] < 1e-7 and done["all"]["change"] > 1e-2
        out = tmp_path / f"of {'gguf' if weights else 'folder'}"
        merge(**given, out=out)
        assert relative_error(of_folder(out), expected) < (max(limit, 1e-4) if weights else limit)


def test_tensors_without_an_adapter_keep_their_bytes_and_names(made, tmp_path):
    folder, _, _ = made(target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    merge(folder / "hf", folder / "peft", tmp_path / "out")
    before, after = (load_file(path / "model.safetensors") for path in (folder / "hf", tmp_path / "out"))
    assert list(before) == list(after)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) == (not ("q_proj" in name or "experts" in name and "down_proj" in name)), name
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    others = {path.name for path in (folder / "hf").iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == others
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a").input_ids == AutoTokenizer.from_pretrained(folder / "hf")("a").input_ids


def test_shards_stay_shards(made, tmp_path):
    folder, base, expected = made()
    base.save_pretrained(tmp_path / "hf", max_shard_size="100KB")
    merge(tmp_path / "hf", folder / "peft", tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "hf").iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names and len(names) > 4
    indexes = [json.loads((tmp_path / where / "model.safetensors.index.json").read_text()) for where in ("hf", "out")]
    assert indexes[0]["weight_map"] == indexes[1]["weight_map"]
    assert relative_error(of_folder(tmp_path / "out"), expected) < 1e-5


@pytest.mark.parametrize("config", [{"target_modules": ["embed_tokens", "lm_head"], "target_parameters": ["mlp.gate.weight"]},
                                    {"target_modules": ["o_proj"], "modules_to_save": ["input_layernorm", "lm_head", "norm"]}],
                         ids=["embedding, head, router", "whole tensors"])  # fmt: skip
def test_every_place(made, config, tmp_path):
    torch.manual_seed(1)
    folder, _, expected = made(**config)
    path = folder / "peft" / "adapter_model.safetensors"
    tensors = load_file(path)
    if "modules_to_save" in config:
        tensors = {n: t if ".lora_" in n else t + 0.3 * torch.randn(t.shape) for n, t in tensors.items()}
        shutil.copytree(folder / "peft", tmp_path / "peft")
        save_file(tensors, tmp_path / "peft" / "adapter_model.safetensors")
        base = model_of("qwen3_moe", **BYTES)
        expected = logits(peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval())
    adapter = tmp_path / "peft" if "modules_to_save" in config else folder / "peft"
    for source in ("hf", "m.gguf"):
        merge(folder / source, adapter, tmp_path / "out.gguf")
        assert relative_error(of_gguf(tmp_path / "out.gguf"), expected) < 1e-4
        out = tmp_path / f"of {source.replace('.', ' ')}"
        merge(folder / source, adapter, out)
        assert relative_error(of_folder(out), expected) < 1e-5


FAMILIES = [
    "aria_text", "qwen3_vl_moe", "inkling_text", "gpt_oss", "llama4", "granitemoe", "ernie4_5_vl_moe", "longcat_flash",
    "deepseek_v4", "minimax_m3_vl", "bailing_hybrid", "gemma4",
]  # fmt: skip
"""Those that store experts in other ways: columns, rows in turn, one by one, dealt out, or more than are computed."""


@pytest.mark.parametrize("family", FAMILIES)
def test_however_a_folder_stores_experts(family, tmp_path):
    base = tiny_model(family)
    save(base, tmp_path / "hf")
    names = ("q_proj", "q_b_proj", "qkv_proj", "o_proj", "down_proj")
    linear = sorted({n for n in names if any(name.endswith(f".{n}") for name, _ in base.named_modules())})
    model = adapted(base, target_modules=linear)
    expected = logits(model)
    model.save_pretrained(tmp_path / "peft")
    done = merge(tmp_path / "hf", tmp_path / "peft", tmp_path / "out")
    assert any("expert" in kind or "input_linear" in kind for kind in done["kinds"])
    merged = type(base).from_pretrained(tmp_path / "out", attn_implementation="eager", dtype=torch.float32).eval()
    assert relative_error(logits(merged), expected) < 1e-5 < 1e-2 < relative_error(logits(base), expected)


# --- quantized bases ----------------------------------------------------------------------------------------


def test_a_quantized_gguf_keeps_its_types_and_tells_what_was_lost(made, tmp_path):
    folder, _, _ = made(target_modules=["q_proj"])
    quantize_folder(folder / "hf", tmp_path / "q8.gguf", "Q8_0")
    done = merge(tmp_path / "q8.gguf", folder / "peft", tmp_path / "out.gguf")
    before, after = (gguf.GGUFReader(tmp_path / name) for name in ("q8.gguf", "out.gguf"))
    assert [t.name for t in before.tensors] == [t.name for t in after.tensors]
    assert {n: f.contents() for n, f in before.fields.items() if not n.startswith("GGUF.")} == {
        n: f.contents() for n, f in after.fields.items() if not n.startswith("GGUF.")
    }
    with open_weights(tmp_path / "q8.gguf") as base, open_weights(tmp_path / "out.gguf") as out:
        lost = wanted = 0.0
        tensors = load_file(folder / "peft" / "adapter_model.safetensors")
        for one, other in zip(before.tensors, after.tensors, strict=True):
            assert one.tensor_type == other.tensor_type
            touched = "attn_q." in one.name or "_exps" in one.name
            assert np.array_equal(one.data, other.data) == (not touched), one.name
            if "attn_q." in one.name:
                layer = f"base_model.model.model.layers.{one.name.split('.')[1]}.self_attn.q_proj"
                a, b = (tensors[f"{layer}.lora_{which}.weight"] for which in "AB")
                right = base.tensor(one.name) + 6 / 4 * (b @ a)
                lost, wanted = lost + (out.tensor(one.name) - right).square().sum(), wanted + right.square().sum()
    found = done["kinds"]["attn_q"]
    assert found["error"] == pytest.approx(float((lost / wanted).sqrt()), rel=1e-4) and 1e-3 < found["error"] < 1e-2
    assert found["types"] == "Q8_0" and found["tensors"] == 3 and set(done["kinds"]) == {
        "attn_q", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"}  # fmt: skip


@pytest.mark.parametrize("source", ["hf", "m.gguf"])
def test_types_as_kt_quantize_has_them(made, source, tmp_path):
    folder, _, expected = made()
    done = merge(folder / source, folder / "peft", tmp_path / "q.gguf", "Q8_0")
    merge(folder / "hf", folder / "peft", tmp_path / "plain")
    quantize_folder(tmp_path / "plain", tmp_path / "same.gguf", "Q8_0")
    with open_weights(tmp_path / "q.gguf") as found, open_weights(tmp_path / "same.gguf") as right:
        assert found.metadata["general.file_type"] == right.metadata["general.file_type"] == 7
        assert found.names() == right.names()
        for name in right.names():
            assert torch.equal(found.packed(name).data, right.packed(name).data), name
    assert done["types"]["Q8_0"] > 10
    assert 1e-3 < relative_error(of_gguf(tmp_path / "q.gguf"), expected) < 0.1


def test_quantized_safetensors_become_floats(made, tmp_path):
    folder, _, _ = made()
    shutil.copytree(folder / "hf", tmp_path / "fp8")
    tensors, plain = load_file(tmp_path / "fp8" / "model.safetensors"), {}
    for name, tensor in list(tensors.items()):
        if tensor.dim() == 2 and "proj" in name:
            codes = (tensor / 0.01).to(torch.float8_e4m3fn)
            tensors[name], tensors[f"{name}_scale_inv"] = codes, torch.full((1, 1), 0.01)
            plain[name] = codes.float() * 0.01
    save_file(tensors, tmp_path / "fp8" / "model.safetensors", metadata={"format": "pt"})
    path = tmp_path / "fp8" / "config.json"
    method = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": method}))
    done = merge(tmp_path / "fp8", folder / "peft", tmp_path / "out", "F32")
    assert any("dequantized to F32" in notice for notice in done["notices"])
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    shutil.copytree(folder / "hf", tmp_path / "plain")
    kept = {name: tensor for name, tensor in (tensors | plain).items() if not name.endswith("_scale_inv")}
    save_file(kept, tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})
    right = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", attn_implementation="eager").eval()
    expected = logits(peft.PeftModel.from_pretrained(right, folder / "peft").eval())
    assert relative_error(of_folder(tmp_path / "out"), expected) < 1e-5
    done = merge(tmp_path / "fp8", folder / "peft", tmp_path / "bf16")
    assert done["types"]["BF16"] > 10 and 1e-4 < done["kinds"]["self_attn.q_proj"]["error"] < 4e-3


@pytest.mark.parametrize("form", ["mxfp4 stacks", "fp8_block", "gptq4_act_order", "awq4", "nvfp4_modelopt"])
def test_every_way_of_quantizing_safetensors_becomes_floats(form, tmp_path):
    make = published_checkpoints.checkpoint if form in published.FORMATS else published_checkpoints.gpt_oss
    folder, truth = make(tmp_path / "hf", *([form] if form in published.FORMATS else []))
    shutil.rmtree(folder / "plain", ignore_errors=True)
    truth.config.save_pretrained(folder)
    method = published.FORMATS[form][3] if form in published.FORMATS else {"quant_method": "mxfp4"}
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": method}))
    plain = AutoModelForCausalLM.from_config(truth.config, attn_implementation="eager").eval()
    plain.load_state_dict({name: tensor.float() for name, tensor in truth.state_dict().items()})
    model = adapted(plain)
    model.save_pretrained(tmp_path / "peft")
    expected = logits(model, 80)
    merge(folder, tmp_path / "peft", tmp_path / "out", "F32")
    assert relative_error(logits(of_path(tmp_path / "out"), 80), expected) < 1e-5
    merge(folder, tmp_path / "peft", tmp_path / "out.gguf", "F32")
    assert relative_error(of_gguf(tmp_path / "out.gguf", truth.config, 80), expected) < 1e-4
    assert relative_error(logits(plain, 80), expected) > 1e-2


def test_a_change_that_storing_drowns_is_said(made, tmp_path):
    folder, _, _ = made()
    shutil.copytree(folder / "peft", tmp_path / "peft")
    path = tmp_path / "peft" / "adapter_model.safetensors"
    save_file({n: t * (0.01 if "lora_B" in n else 1) for n, t in load_file(path).items()}, path)
    done = merge(folder / "hf", tmp_path / "peft", tmp_path / "out.gguf", "Q4_0")
    assert any(n.startswith("storing attn_k, attn_output") and "larger --type" in n for n in done["notices"])
    assert not any("storing" in n for n in merge(folder / "hf", folder / "peft", tmp_path / "out.gguf", "Q8_0")["notices"])


def test_experts_one_by_one_and_a_whole_kv_b(made, tmp_path):
    """Files of 2024 hold Mixtral's experts apart, and DeepSeek's kv_b_proj as the model does."""
    folder, _, expected = made("mixtral")

    def apart(name, data, kind):
        if "_exps." in name:
            return [(name.replace("_exps.weight", f".{e}.weight"), matrix) for e, matrix in enumerate(data)]

    edit_gguf(folder / "m.gguf", tmp_path / "old.gguf", apart)
    merge(tmp_path / "old.gguf", folder / "peft", tmp_path / "out.gguf")
    assert relative_error(of_gguf(tmp_path / "out.gguf"), expected) < 1e-4

    folder, base, expected = made("deepseek_v3", **targets("deepseek_v3"))
    whole = {f"blk.{n}.attn_kv_b.weight": layer.self_attn.kv_b_proj.weight.detach().numpy()
             for n, layer in enumerate(base.model.layers)}  # fmt: skip

    def joined(name, data, kind):
        both = name.replace("attn_k_b", "attn_kv_b")
        return [(name, data), (both, whole[both])] if "attn_k_b" in name else None

    for edit in (joined, lambda n, d, k: [] if "attn_v_b" in n else [(j, w) for j, w in joined(n, d, k) if "kv_b" in j] if "attn_k_b" in n else None):
        edit_gguf(folder / "m.gguf", tmp_path / "old.gguf", edit)
        merge(tmp_path / "old.gguf", folder / "peft", tmp_path / "out.gguf")
        assert relative_error(of_gguf(tmp_path / "out.gguf", base.config), expected) < 1e-4


def test_a_split_file_becomes_one(made, tmp_path):
    folder, _, expected = made()
    parts = quantize_folder(folder / "hf", tmp_path / "m.gguf", "F32", 10)["files"]
    assert len(parts) > 2
    merge(parts[0], folder / "peft", tmp_path / "out.gguf")
    assert relative_error(of_gguf(tmp_path / "out.gguf"), expected) < 1e-4


def test_a_gguf_adapter_is_merged_as_the_folder_it_was_made_of(made, tmp_path):
    folder, base, expected = made()
    lora = peft_to_gguf(folder / "peft", tmp_path / "a.gguf", base.config)
    merge(folder / "hf", lora, tmp_path / "out")
    assert relative_error(of_folder(tmp_path / "out"), expected) < 1e-5


# --- refused ------------------------------------------------------------------------------------------------


def test_what_cannot_be_merged_is_refused_and_nothing_written(made, tmp_path):
    folder, _, _ = made()
    hf, adapter, out = folder / "hf", folder / "peft", tmp_path / "out"
    other = made("olmoe")[0]
    wrong = [
        ((tmp_path / "none", adapter, out), WeightError, "no such folder"),
        ((hf, tmp_path / "none", out), WeightError, "no such file or folder"),
        ((hf, hf, out), WeightError, "no adapter_config.json"),
        ((hf, folder / "m.gguf", out), WeightError, "general.type is 'model'"),
        ((other / "hf", adapter, out), WeightError, "does not fit the model"),
        ((hf, adapter, hf), WeightError, "is the base itself"),
        ((hf, adapter, out, "", hf), WeightError, "--weights .*expected the path of a .gguf"),
        ((hf, adapter, out, "Q8_0"), UnsupportedError, "F32, F16, BF16"),
        ((hf, adapter, tmp_path / "o.gguf", "Q4_K_N"), UnsupportedError, "did you mean 'Q4_K_M'"),
    ]
    for arguments, kind, words in wrong:
        with pytest.raises(kind, match=words):
            merge(*arguments)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_finite_is_named(made, tmp_path):
    folder, _, _ = made()
    shutil.copytree(folder / "peft", tmp_path / "peft")
    path = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"][3, 1] = float("nan")
    save_file(tensors, path)
    for source in ("hf", "m.gguf"):
        with pytest.raises(WeightError, match=r"blk\.1\.attn_k\.weight: "):
            merge(folder / source, tmp_path / "peft", tmp_path / "out.gguf", "Q8_0")
    assert [path.name for path in tmp_path.iterdir()] == ["peft"]


def test_other_weights_in_the_folder_are_not_mixed_with(made, tmp_path):
    folder, _, _ = made()
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(WeightError, match="also holds model-00001-of-00002"):
        merge(folder / "hf", folder / "peft", tmp_path)


def test_a_type_without_encoder_is_told_beforehand(made, tmp_path):
    folder, _, _ = made(target_modules=["q_proj"])
    iq = gguf.GGMLQuantizationType.Q5_0

    def older(name, data, kind):
        return [(name, gguf.quantize(data, iq), iq)] if "attn_q." in name else None

    edit_gguf(folder / "m.gguf", tmp_path / "old.gguf", older)
    with pytest.raises(UnsupportedError, match=r"blk\.0\.attn_q\.weight: stored as Q5_0(.|\n)*") as caught:
        merge(tmp_path / "old.gguf", folder / "peft", tmp_path / "out.gguf")
    assert "--type" in str(caught.value) and not (tmp_path / "out.gguf").exists()
    merge(tmp_path / "old.gguf", folder / "peft", tmp_path / "out.gguf", "Q8_0")


def test_a_tied_embedding_is_refused(tmp_path):
    base = model_of("lfm2_moe")
    base.save_pretrained(tmp_path / "hf")
    adapted(base, target_modules=["embed_tokens"], target_parameters=None).save_pretrained(tmp_path / "peft")
    with pytest.raises(UnsupportedError, match=r"one tensor for lm_head\.weight and model\.embed_tokens\.weight"):
        merge(tmp_path / "hf", tmp_path / "peft", tmp_path / "out")


# --- the program --------------------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(cli.app, ["merge", *map(str, arguments)])


def test_the_program_prints_a_table_or_json_and_overwrites_only_when_told(made, tmp_path):
    folder, _, _ = made()
    ran = run(folder / "hf", folder / "peft", "-o", tmp_path / "out")
    assert ran.exit_code == 0 and "lost in storing" in ran.stdout and "self_attn.q_proj" in ran.stdout, ran.output
    ran = run(folder / "hf", folder / "peft", "-o", tmp_path / "out")
    assert ran.exit_code == 1 and "is not empty" in ran.stderr
    ran = run(folder / "hf", folder / "peft", "-o", tmp_path / "out", "--force", "--type", "BF16", "--json")
    done = json.loads(ran.stdout)
    assert done["bytes"] == sum(Path(path).stat().st_size for path in done["files"]) and done["all"]["error"] > 1e-4
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    for _ in range(2):
        ran = run(folder / "m.gguf", folder / "peft", "-o", tmp_path / "m.gguf", "--type", "Q4_K_M", "--json")
    assert ran.exit_code == 1 and "--force" in json.loads(ran.stdout)["error"]["message"]
