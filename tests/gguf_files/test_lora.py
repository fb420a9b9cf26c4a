"""GGUF LoRA files: from PEFT and back the logits are the same, in every family; what cannot be said is refused by name."""

import copy
import json

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from ktransformers.errors import KTransformersError, UnsupportedError, WeightError
from ktransformers.gguf_files.lora import gguf_to_peft, peft_to_gguf
from tests.gguf_files.test_families import CONFIGS, model_of
from tests.tiny import random_ids, relative_error

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

EXPERTS = ["experts.gate_up_proj", "experts.up_proj", "experts.down_proj"]
LINEARS = (
    "q_proj", "k_proj", "v_proj", "o_proj", "q_a_proj", "q_b_proj", "in_proj_qkvz", "in_proj_qkv", "in_proj_z",
    "in_proj_b", "out_proj", "gate_proj", "up_proj", "down_proj", "shared_expert_gate", "input_linear", "output_linear",
)  # fmt: skip


def adapted(model, **config):
    """A copy of `model` with a random adapter on every linear layer that a GGUF file has, and in the experts."""
    model = copy.deepcopy(model)
    mamba = model.config.model_type in ("nemotron_h", "granitemoehybrid", "jamba")  # PEFT refuses their out_proj
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.endswith(LINEARS) and not (mamba and name.endswith("out_proj"))
    }
    given = {"r": 4, "lora_alpha": 6, "target_modules": sorted(linear), "target_parameters": EXPERTS, **config}
    model = peft.get_peft_model(model, peft.LoraConfig(**given))
    torch.manual_seed(5)
    for name, tensor in sorted(model.named_parameters()):
        if ".lora_" in name:
            tensor.data.normal_(0, 0.1)
    return model.eval()


def logits(model, vocab=96):
    with torch.no_grad():
        return model(random_ids(2, 11, vocab=vocab)).logits


def rewrite(folder, **settings):
    """Change adapter_config.json."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize("model_type", CONFIGS)
def test_to_gguf_and_back_in_every_family(model_type, tmp_path):
    base = model_of(model_type)
    model = adapted(base)
    expected = logits(model)
    assert relative_error(logits(base), expected) > 1e-3
    model.save_pretrained(tmp_path / "peft")
    peft_to_gguf(tmp_path / "peft", tmp_path / "a.gguf", base.config)
    gguf_to_peft(tmp_path / "a.gguf", base.config, tmp_path / "back")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "back").eval()
    assert relative_error(logits(again), expected) < 1e-6
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "back"))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(second[name], tensor), name


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "experts.gate_up_proj": 3, r"layers\.1.*o_proj": 5}},
        {"alpha_pattern": {"experts.down_proj": 9, "v_proj": 1}},
        {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "target_parameters": None},
        {"target_modules": None, "target_parameters": ["mlp.gate.weight", "experts.down_proj"]},
        {"target_modules": ["k_proj"], "target_parameters": None, "layers_to_transform": [1]},
    ],
    ids=["rslora", "ranks", "alphas", "embedding", "router", "one layer"],
)
def test_every_scale_and_place_comes_back(config, tmp_path):
    base = model_of("qwen3_moe")
    model = adapted(base, **config)
    model.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    peft_to_gguf(tmp_path / "peft", tmp_path / "a.gguf", base.config)
    gguf_to_peft(tmp_path / "a.gguf", base.config, tmp_path / "back")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "back").eval()
    assert relative_error(logits(again), logits(model)) < 1e-6


def test_the_gguf_package_reads_what_llama_cpp_looks_for(tmp_path):
    base = model_of("qwen3_moe")
    adapted(base).save_pretrained(tmp_path / "peft")
    reader = gguf.GGUFReader(peft_to_gguf(tmp_path / "peft", tmp_path / "a.gguf", base.config))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == "qwen3moe" and fields["adapter.lora.alpha"] == 6
    shapes = {tensor.name: list(map(int, tensor.shape)) for tensor in reader.tensors}  # in the order of ggml
    assert shapes["blk.2.attn_q.weight.lora_a"] == [64, 4] and shapes["blk.2.attn_q.weight.lora_b"] == [4, 64]
    for kind, columns, rows in (("gate", 64, 32), ("up", 64, 32), ("down", 32, 64)):
        assert shapes[f"blk.0.ffn_{kind}_exps.weight.lora_a"] == [columns, 4, 4]
        assert shapes[f"blk.0.ffn_{kind}_exps.weight.lora_b"] == [4, rows, 4]
    data = {tensor.name: tensor.data for tensor in reader.tensors}
    assert (data["blk.0.ffn_gate_exps.weight.lora_a"] == data["blk.0.ffn_up_exps.weight.lora_a"]).all()


@pytest.mark.parametrize("lacking", ["gate", "up", ""])
def test_gate_and_up_with_inputs_of_their_own_become_one_of_both_ranks(lacking, tmp_path):
    """Other programs adapt gate and up apart. PEFT's gate_up has one A, so ranks add up."""
    base = model_of("qwen3_moe")
    torch.manual_seed(2)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "qwen3moe")
    writer.add_type("adapter"), writer.add_string("adapter.type", "lora"), writer.add_float32("adapter.lora.alpha", 3.0)
    expected = copy.deepcopy(base)
    for kind, rank in (("gate", 2), ("up", 5)):
        if kind != lacking:
            a, b = torch.randn(4, rank, 64), torch.randn(4, 32, rank)
            for which, factor in (("a", a), ("b", b)):
                writer.add_tensor(f"blk.1.ffn_{kind}_exps.weight.lora_{which}", factor.numpy())
            rows = slice(0, 32) if kind == "gate" else slice(32, 64)
            expected.model.layers[1].mlp.experts.gate_up_proj.data[:, rows] += 3.0 / rank * (b @ a)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    gguf_to_peft(tmp_path / "a.gguf", base.config, tmp_path / "back")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "back").eval()
    assert relative_error(logits(again), logits(expected)) < 1e-5


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    adapted(model_of("qwen3_moe")).save_pretrained(tmp_path / "peft")
    return tmp_path / "peft"


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"use_dora": True}, "use_dora is True.*merge_and_unload"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4.*path_initial_model"),
    ],
)
def test_what_is_more_than_two_factors_is_refused(settings, words, folder, tmp_path):
    rewrite(folder, **settings)
    with pytest.raises(UnsupportedError, match=words):
        peft_to_gguf(folder, tmp_path / "a.gguf", model_of("qwen3_moe").config)
    assert not (tmp_path / "a.gguf").exists()


def test_another_base_is_told_with_every_tensor(folder, tmp_path):
    other = model_of("qwen3_moe", hidden_size=32, num_hidden_layers=2).config
    with pytest.raises(WeightError, match=r"does not fit(.|\n)*q_proj.*\n(.|\n)*no matrix in model\.layers\.2") as caught:
        peft_to_gguf(folder, tmp_path / "a.gguf", other)
    assert len(caught.value.problems) > 10
    config = model_of("qwen3_moe").config
    file = peft_to_gguf(folder, tmp_path / "a.gguf", config)
    with pytest.raises(WeightError, match="no factors of"):
        gguf_to_peft(file, other, tmp_path / "back")
    with pytest.raises(WeightError, match="'qwen3moe' models, this one is 'olmoe'"):
        gguf_to_peft(file, model_of("olmoe").config, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_whole_tensors_and_latent_attention_are_refused_by_name(tmp_path):
    base = model_of("deepseek_v3")
    adapted(base, target_modules=["kv_b_proj"]).save_pretrained(tmp_path / "kv")
    with pytest.raises(UnsupportedError, match=r"kv_b_proj.*kt merge"):
        peft_to_gguf(tmp_path / "kv", tmp_path / "a.gguf", base.config)
    adapted(base, target_modules=["o_proj"], modules_to_save=["input_layernorm"]).save_pretrained(tmp_path / "norm")
    with pytest.raises(UnsupportedError, match=r"input_layernorm.*kt merge"):
        peft_to_gguf(tmp_path / "norm", tmp_path / "a.gguf", base.config)


def test_damaged_adapters(folder, tmp_path):
    config = model_of("qwen3_moe").config
    for settings, words in (({"lora_alpha": "8"}, "expected a number"), ({"alpha_pattern": {"(": 2}}, "no regular")):
        before = (folder / "adapter_config.json").read_text()
        rewrite(folder, **settings)
        with pytest.raises(WeightError, match=words):
            peft_to_gguf(folder, tmp_path / "a.gguf", config)
        (folder / "adapter_config.json").write_text(before)
    tensors = load_file(folder / "adapter_model.safetensors")
    one = next(name for name in tensors if "lora_B" in name)
    save_file({name: t for name, t in tensors.items() if name != one}, folder / "adapter_model.safetensors")
    with pytest.raises(WeightError, match="without its other factor"):
        peft_to_gguf(folder, tmp_path / "a.gguf", config)
    old = {"base_model.model.model.layers.0.mlp.experts.1.gate_proj.lora_A.weight": torch.zeros(4, 64),
           "base_model.model.model.layers.0.mlp.experts.1.gate_proj.lora_B.weight": torch.zeros(32, 4)}  # fmt: skip
    save_file(old, folder / "adapter_model.safetensors")
    with pytest.raises(WeightError, match="before transformers 5"):
        peft_to_gguf(folder, tmp_path / "a.gguf", config)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(WeightError, match=r"no adapter_model\.safetensors"):
        peft_to_gguf(folder, tmp_path / "a.gguf", config)
    with pytest.raises(WeightError, match=r"no adapter_config\.json"):
        peft_to_gguf(tmp_path, tmp_path / "a.gguf", config)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(KTransformersError):
        gguf_to_peft(tmp_path / "model.gguf", config, tmp_path / "back")
