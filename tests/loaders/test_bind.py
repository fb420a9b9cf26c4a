"""Both formats deliver, by module name, exactly the weights of the model that was saved, and name all that is
wrong."""

import copy
import pickle
import re
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ktransformers import optimize_and_load
from ktransformers.errors import UnsupportedError, WeightError
from ktransformers.gguf_files.write import quantize_folder
from ktransformers.loaders import bind, open_weights
from ktransformers.loaders.problems import TensorProblem, grouped
from tests.loaders import small_files

EXPERTS = "model.layers.1.mlp.experts"


class Saved:
    """One tiny model in every form."""

    def __init__(self, family: str, root) -> None:
        self.family, self.root, self.model = family, root, small_files.model(family)
        self.state = self.model.state_dict()
        self.model.save_pretrained(root / "hf")
        self.model.save_pretrained(root / "sharded", max_shard_size="100KB")
        (root / "stacked").mkdir()
        save_file({n: t.clone() for n, t in self.state.items()}, root / "stacked" / "model.safetensors")
        for mix in ("F32", "BF16", "Q8_0"):
            out = root / mix.lower() / "model.gguf"
            quantize_folder(root / "hf", out, mix, split=9 if mix == "BF16" else 0)

    @property
    def gguf(self):
        return self.root / "f32" / "model.gguf"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`saved(family)`, each made once."""
    made = {}

    def get(family: str) -> Saved:
        if family not in made:
            made[family] = Saved(family, tmp_path_factory.mktemp(family))
        return made[family]

    return get


@pytest.fixture(params=small_files.FAMILIES)
def each(request, saved):
    return saved(request.param)


def bound(path, family, **changes):
    model = small_files.meta(family, **changes)
    return bind(open_weights(path), model), small_files.expected(model)


# --- the same weights from every form -----------------------------------------------------------------------


@pytest.mark.parametrize("form", ["hf", "sharded", "stacked", "f32", "bf16"])
def test_exact_forms(each, form):
    """Every tensor of safetensors (single, sharded, stacked) and of F32 and split BF16 GGUF equals the
    model's."""
    weights, expected = bound(each.root / form, each.family)
    assert weights.problems(expected) == []
    for name, tensor in each.state.items():
        assert weights.shape(name) == tuple(tensor.shape), name
        assert torch.equal(weights.tensor(name, dtype=torch.float32), tensor), name
    if form in ("sharded", "bf16"):
        assert len(weights.files.paths) > 1


def test_q8_0(each):
    """Every tensor of a Q8_0 file is as near as eight bits allow, and no tensor is out of place."""
    weights, expected = bound(each.root / "q8_0", each.family)
    assert weights.problems(expected) == []
    for name, tensor in each.state.items():
        assert torch.allclose(weights.tensor(name, dtype=torch.float32), tensor, atol=0.5 * 0.5 / 127), name


@pytest.mark.parametrize("form", ["hf", "stacked", "f32", "bf16", "q8_0"])
def test_experts(each, form):
    """`experts` delivers E matrices of gate, up and down, as views of the file, equal to the model's
    slices."""
    weights, _ = bound(each.root / form, each.family)
    assert weights.has_experts(EXPERTS) and not weights.has_experts("model.layers.1.self_attn")
    experts = weights.experts(EXPERTS)
    gate_up, down = each.state[f"{EXPERTS}.gate_up_proj"], each.state[f"{EXPERTS}.down_proj"]
    rows = gate_up.shape[1] // 2
    maps = {weights.files.packed(n).data.untyped_storage().data_ptr() for n in weights.files.names()}
    assert len(experts.gate) == len(experts.up) == len(experts.down) == len(gate_up)
    for e in range(len(gate_up)):
        for packed, truth in (
            (experts.gate[e], gate_up[e, :rows]),
            (experts.up[e], gate_up[e, rows:]),
            (experts.down[e], down[e]),
        ):
            assert packed.shape == tuple(truth.shape)
            assert packed.data.untyped_storage().data_ptr() in maps, "copied"
            assert torch.allclose(packed.dequantize(), truth, atol=0.002 if form == "q8_0" else 0)


@pytest.mark.parametrize("form", ["hf", "f32", "bf16", "q8_0"])
def test_packed_equals_tensor(each, form):
    """Wherever packed bytes can be delivered they dequantize to the tensor; elsewhere asking is an error."""
    weights, expected = bound(each.root / form, each.family)
    for name in expected:
        if weights.can_pack(name):
            packed = weights.packed(name)
            assert packed.shape == weights.shape(name)
            assert torch.equal(packed.dequantize(), weights.tensor(name, dtype=torch.float32)), name
        else:
            with pytest.raises(WeightError, match=re.escape(name)):
                weights.packed(name)
    assert weights.can_pack("model.layers.0.self_attn.o_proj.weight")
    assert not weights.can_pack("nonsense")


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_transformers_reads_our_gguf(saved, family):
    """transformers' own GGUF reader finds the model's weights in our files: names and layout are not only
    ours."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    one = saved(family)
    theirs = load_gguf_checkpoint(one.gguf, return_tensors=True, model_to_load=small_files.meta(family))["tensors"]
    dense = (
        "model.layers.0.mlp." if family == "qwen2_moe" else "-"
    )  # a dense layer, which they do not look for
    for name, tensor in one.state.items():
        if not name.startswith(dense):
            assert torch.equal(theirs[name].view(tensor.shape), tensor), name


def test_permutation_is_transformers(saved):
    """q and k rows of a llama-type file go back as transformers' own reader puts them, heads and kv heads
    apart."""
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    one = saved("mixtral")
    processor = LlamaTensorProcessor(config={"num_attention_heads": 4, "num_key_value_heads": 2})
    files = open_weights(one.gguf)
    for kind, heads in (("q", 4), ("k", 2)):
        stored = files.tensor(f"blk.1.attn_{kind}.weight")
        truth = one.state[f"model.layers.1.self_attn.{kind}_proj.weight"]
        assert not torch.equal(stored, truth)
        name = f"blk.1.attn_{kind}.weight"
        back = processor.process(weights=stored.numpy().copy(), name=name).weights
        assert torch.equal(torch.as_tensor(np.ascontiguousarray(back)), truth), heads


def test_dtype_and_types(saved):
    """Without a dtype the stored float type comes out; `quant_type` names what is stored."""
    weights, _ = bound(saved("deepseek_v3").root / "bf16", "deepseek_v3")
    assert weights.tensor("model.embed_tokens.weight").dtype == torch.bfloat16
    assert weights.tensor("model.layers.1.self_attn.kv_b_proj.weight").dtype == torch.bfloat16
    assert weights.tensor("model.layers.1.mlp.gate.e_score_correction_bias").dtype == torch.float32
    assert weights.quant_type(f"{EXPERTS}.gate_up_proj") == "BF16"
    assert weights.stored_names("model.layers.1.mlp.gate.e_score_correction_bias") == (
        "blk.1.exp_probs_b.bias",
    )
    assert weights.nbytes(f"{EXPERTS}.gate_up_proj") == 4 * 64 * 64 * 2
    with pytest.raises(WeightError, match="did you mean 'model.norm.weight'"):
        weights.tensor("model.nrom.weight")


# --- what old and odd files do ------------------------------------------------------------------------------


def per_expert(name, data, _):
    """Split stacked experts as Mixtral files of early 2024 have them."""
    match = re.fullmatch(r"(blk\.\d+\.ffn_(?:gate|up|down))_exps\.weight", name)
    return match and [(f"{match[1]}.{e}.weight", part) for e, part in enumerate(data)]


def fused_experts(name, data, _, kept={}):  # noqa: B006 (the gate waits there for its up)
    if name.endswith("ffn_gate_exps.weight"):
        kept[0] = data
        return []
    if name.endswith("ffn_up_exps.weight"):
        return [(name.replace("up", "gate_up"), np.concatenate([kept[0], data], 1))]
    return None


def test_mixtral_with_experts_one_by_one(saved, tmp_path):
    """Per-expert tensors of an old Mixtral file are found; one missing is named, and the others are not
    "unused"."""
    one = saved("mixtral")
    weights, expected = bound(small_files.edit_gguf(one.gguf, tmp_path / "old.gguf", per_expert), "mixtral")
    assert weights.problems(expected) == []
    assert torch.equal(weights.tensor(f"{EXPERTS}.gate_up_proj"), one.state[f"{EXPERTS}.gate_up_proj"])
    assert torch.equal(weights.experts(EXPERTS).down[3].dequantize(), one.state[f"{EXPERTS}.down_proj"][3])
    cut = small_files.edit_gguf(
        tmp_path / "old.gguf",
        tmp_path / "cut.gguf",
        lambda n, *_: [] if n == "blk.1.ffn_up.2.weight" else None,
    )
    weights, expected = bound(cut, "mixtral")
    problems = weights.problems(expected)
    assert any("gate_up_proj: missing" in p and "blk.1.ffn_up.2.weight" in p for p in problems), problems


def test_fused_gate_up_in_gguf(saved, tmp_path):
    """A file that holds gate and up of all experts in one tensor is read too."""
    one = saved("qwen3_moe")
    weights, expected = bound(small_files.edit_gguf(one.gguf, tmp_path / "fused.gguf", fused_experts), "qwen3_moe")
    assert weights.problems(expected) == []
    gate_up = one.state[f"{EXPERTS}.gate_up_proj"]
    assert torch.equal(weights.tensor(f"{EXPERTS}.gate_up_proj"), gate_up)
    assert torch.equal(weights.experts(EXPERTS).up[2].dequantize(), gate_up[2, 32:])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0", "Q4_K", "MXFP4"])
def test_one_fused_stack_is_cut_into_gate_and_up(kind, interleaved):
    """Packed rows of gate and up, one after the other or in turn, are the numbers of the whole stack's rows."""
    from ktransformers.loaders.sources import Plain, split_gate_up
    from ktransformers.quants.blocks import QUANT_TYPES, Packed

    type_ = QUANT_TYPES[kind]
    data = torch.randint(0, 60, (type_.packed_bytes((3, 10, 512)),), dtype=torch.uint8)
    whole = Packed(data, type_, (3, 10, 512))
    files = SimpleNamespace(info=lambda name: SimpleNamespace(shape=whole.shape, type=type_), packed=lambda name: whole)
    gate, up = split_gate_up(Plain(files, "experts.gate_up_proj"), interleaved)
    numbers = whole.dequantize()
    expected = (numbers[:, 0::2], numbers[:, 1::2]) if interleaved else numbers.chunk(2, 1)
    for found, right in zip((gate, up), expected, strict=True):
        assert torch.equal(torch.stack([matrix.dequantize() for matrix in found]), right)


def whole_kv_b(state, keep: bool):
    """An edit that writes attn_kv_b, as files before mid-2025 have it, with or instead of the split
    tensors."""

    def edit(name, data, _):
        match = re.fullmatch(r"blk\.(\d+)\.attn_k_b\.weight", name)
        if match:
            whole = state[f"model.layers.{match[1]}.self_attn.kv_b_proj.weight"].numpy()
            return [(f"blk.{match[1]}.attn_kv_b.weight", whole)] + ([(name, data)] if keep else [])
        return [] if "attn_v_b" in name and not keep else None

    return edit


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_kv_b_whole_split_and_flat(saved, tmp_path, family):
    """kv_b_proj comes out the same from attn_kv_b, from that beside the split, and from 2-D split tensors."""
    one = saved(family)

    def flat(name, data, _):
        return [(name, data.reshape(-1, data.shape[-1]))] if re.search("attn_[kv]_b", name) else None

    edits = {"whole": whole_kv_b(one.state, False), "both": whole_kv_b(one.state, True), "flat": flat}
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    for case, edit in edits.items():
        weights, expected = bound(small_files.edit_gguf(one.gguf, tmp_path / f"{case}.gguf", edit), family)
        assert weights.problems(expected) == [], case
        assert torch.equal(weights.tensor(name), one.state[name]), case
        assert weights.can_pack(name) == (case != "flat")


def test_ignored_tensors(saved, tmp_path):
    """rope_freqs in GGUF, and inv_freq and multi-token-prediction layers in safetensors, are not called
    unused."""
    one = saved("deepseek_v3")

    def extra(name, data, _):
        rope = ("rope_freqs.weight", np.ones(4, np.float32))
        return [(name, data), rope] if name == "output.weight" else None

    weights, expected = bound(small_files.edit_gguf(one.gguf, tmp_path / "x.gguf", extra), "deepseek_v3")
    assert weights.problems(expected) == []
    tensors = load_file(one.root / "hf" / "model.safetensors")
    tensors["model.layers.2.eh_proj.weight"] = torch.ones(2)
    tensors["model.layers.2.mlp.experts.0.gate_proj.weight"] = torch.ones(2, 2)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(tensors, tmp_path / "model.safetensors")
    weights, expected = bound(tmp_path / "model.safetensors", "deepseek_v3")
    assert weights.problems(expected) == []
    tensors["model.layers.9.extra.weight"] = torch.ones(2)
    save_file(tensors, tmp_path / "model.safetensors")
    weights, expected = bound(tmp_path / "model.safetensors", "deepseek_v3")
    assert len(weights.problems(expected)) == 1
    assert weights.problems(expected, [r"^model\.layers\.9\."]) == []


@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_tied_embeddings(tmp_path, form):
    """A tied model loads from files without lm_head, which is delivered from the embedding, and from files
    with it."""
    model = small_files.model("qwen3_moe", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf"
    if form == "gguf":
        path = tmp_path / "x.gguf"
        quantize_folder(tmp_path / "hf", path, "F32")
        assert "output.weight" not in open_weights(path)
    weights, expected = bound(path, "qwen3_moe", tie_word_embeddings=True)
    assert "lm_head.weight" not in expected and weights.problems(expected) == []
    assert torch.equal(weights.tensor("lm_head.weight"), model.lm_head.weight)
    untied, expected = bound(path, "qwen3_moe")
    assert len(untied.problems(expected)) == 1 and "lm_head.weight: missing" in untied.problems(expected)[0]


@pytest.mark.parametrize("form", ["hf", "f32"])
def test_tied_model_whose_file_has_the_head(saved, form):
    """An lm_head in the file of a tied model is no problem."""
    weights, expected = bound(saved("qwen3_moe").root / form, "qwen3_moe", tie_word_embeddings=True)
    assert "lm_head.weight" not in expected and weights.problems(expected) == []


def test_names_of_the_base_model(saved, tmp_path):
    """A checkpoint of the model without its head, whose names lack `model.`, finds its places."""
    one = saved("qwen2_moe")
    tensors = {n.removeprefix("model."): t.clone() for n, t in one.state.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    weights, expected = bound(tmp_path, "qwen2_moe")
    assert weights.problems(expected) == []


@pytest.mark.parametrize("stored", [torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool])
def test_integers_of_the_model_are_delivered_as_they_are(stored, tmp_path):
    """A buffer of integers is delivered exactly, whatever integer type it is stored as."""
    model, values = meta_with_table(torch.int64), (torch.arange(15).view(5, 3) * 7).to(stored)
    weights, problems = bound_with_table(model, values, tmp_path)
    assert problems == []
    assert torch.equal(weights.tensor("table", dtype=torch.int64), values.long())
    assert torch.equal(weights.tensor("table"), values)


@pytest.mark.parametrize("held, stored", [(torch.float32, torch.int64), (torch.int32, torch.int64)])
def test_integers_that_the_model_holds_otherwise_are_refused(held, stored, tmp_path):
    """Quantized integers for a float, and integers wider than the model's, are named before loading."""
    _, problems = bound_with_table(meta_with_table(held), torch.ones(5, 3, dtype=stored), tmp_path)
    assert len(problems) == 1 and "table: stored as I64, not computed yet; save the model" in problems[0]


def meta_with_table(dtype: torch.dtype):
    """A tiny model with a table of experts by token, as the hash layers of DeepSeek-V4 have."""
    model = small_files.meta("qwen3_moe")
    model.register_buffer("table", torch.zeros(5, 3, dtype=dtype, device="meta"))
    return model


def bound_with_table(model, values, folder):
    tensors = {n: torch.zeros(t.shape) for n, t in model.state_dict().items() if n != "table"}
    save_file({**tensors, "table": values}, folder / "model.safetensors")
    weights = bind(open_weights(folder), model)
    return weights, weights.problems(small_files.expected(model))


def test_a_model_copies_with_its_open_weights(saved):
    """deepcopy shares the mapped files; pickling them says what to do instead."""
    weights, _ = bound(saved("qwen3_moe").root / "hf", "qwen3_moe")
    model = torch.nn.Linear(2, 2)
    model.gguf_loader = weights
    assert copy.deepcopy(model).gguf_loader is weights
    with pytest.raises(UnsupportedError, match="cannot be pickled.*save_pretrained"):
        pickle.dumps(model)


# --- what is wrong, all at once -----------------------------------------------------------------------------


def test_missing_unused_and_misshapen_together(saved, tmp_path):
    """One list names a missing, a misnamed, a misshapen, an unused and an uncomputable tensor, nothing
    else."""
    tensors = load_file(saved("qwen3_moe").root / "hf" / "model.safetensors")
    del tensors["model.layers.0.input_layernorm.weight"]
    tensors["model.layers.1.self_attn.q_porj.weight"] = tensors.pop("model.layers.1.self_attn.q_proj.weight")
    tensors["model.norm.weight"] = torch.ones(63)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)
    tensors["model.layers.0.mlp.experts.4.down_proj.weight"] = torch.ones(2)
    del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    weights, expected = bound(tmp_path, "qwen3_moe")
    problems = weights.problems(expected)
    assert len(problems) == 7, "\n".join(problems)
    for start, part in (
        ("model.layers.0.input_layernorm.weight:", "missing"),
        ("model.layers.1.self_attn.q_proj.weight:", "did you mean 'model.layers.1.self_attn.q_porj.weight'"),
        ("model.layers.1.mlp.experts.gate_up_proj:", "mlp.experts.2.up_proj.weight"),
        ("model.norm.weight:", "[63] in the checkpoint, the model expects [64]"),
        ("lm_head.weight:", "F8_E4M3 without scales, expected lm_head.weight_scale_inv or lm_head.weight_scale"),
        ("model.layers.1.self_attn.q_porj.weight:", "no place"),
        ("model.layers.0.mlp.experts.4.down_proj.weight:", "no place"),
    ):
        assert any(p.startswith(start) and part in p for p in problems), (start, "\n".join(problems))


def test_experts_of_different_shapes(saved, tmp_path):
    """One expert of another shape is a misshapen tensor, and delivering it is an error of ours."""
    tensors = load_file(saved("qwen3_moe").root / "hf" / "model.safetensors")
    tensors["model.layers.1.mlp.experts.2.up_proj.weight"] = torch.ones(31, 64)
    tensors["model.layers.0.mlp.experts.0.down_proj.weight"] = torch.ones(5)
    save_file(tensors, tmp_path / "model.safetensors")
    weights, expected = bound(tmp_path, "qwen3_moe")
    problems = weights.problems(expected)
    assert len(problems) == 2 and all("has shape" in p for p in problems), problems
    assert any("[32, 64] and [31, 64]" in p for p in problems)
    for call in (weights.tensor, weights.packed, lambda n: weights.experts(n.rpartition(".")[0])):
        with pytest.raises(WeightError, match="do not fit together"):
            call(f"{EXPERTS}.gate_up_proj")


def test_gguf_damage(saved, tmp_path):
    """Missing, unused and misshapen tensors of a GGUF file are named with the names on both sides."""
    edits = {
        "blk.0.attn_norm.weight": [],
        "blk.1.ffn_up_exps.weight": [],
        "output_norm.weight": [("output_norm.weight", np.ones(3, np.float32))],
        "blk.1.attn_k_b.weight": [("blk.1.attn_k_b.weight", np.ones((4, 30, 16), np.float32))],
        "output.weight": [("outptu.weight", np.ones((80, 64), np.float32))],
    }
    path = small_files.edit_gguf(saved("deepseek_v3").gguf, tmp_path / "x.gguf", lambda n, *_: edits.get(n))
    weights, expected = bound(path, "deepseek_v3")
    problems = weights.problems(expected)
    for start, part in (
        ("model.layers.0.input_layernorm.weight: missing", "blk.0.attn_norm.weight"),
        ("model.layers.1.mlp.experts.gate_up_proj: missing", "blk.1.ffn_up_exps.weight"),
        ("model.norm.weight: has shape [3]", "expects [64]"),
        ("model.layers.1.self_attn.kv_b_proj.weight: has shape [4, 30, 16]", "expects [160, 32]"),
        ("lm_head.weight: missing", "output.weight"),
        ("outptu.weight: in the checkpoint", "no place"),
        ("blk.1.ffn_gate_exps.weight: in the checkpoint", "no place"),
    ):
        assert any(p.startswith(start) and part in p for p in problems), (start, "\n".join(problems))
    assert len(problems) == 7, "\n".join(problems)


def test_config_and_file_disagree(saved):
    """A config of other sizes than the file's is told in the file's and the config's words, before the
    tensors."""
    weights, expected = bound(saved("qwen3_moe").gguf, "qwen3_moe", num_hidden_layers=3, num_attention_heads=2)
    problems = weights.problems(expected)
    assert problems[0].startswith(
        "qwen3moe.block_count is 2 in the GGUF file, the config has num_hidden_layers 3"
    )
    assert "attention.head_count is 4" in problems[1]
    assert any(p.startswith("model.layers.2.mlp.experts.gate_up_proj: missing") for p in problems)


def test_heads_of_keys_that_shapes_do_not_tell(saved):
    """Half as many heads of twice the size have the same rows."""
    one = saved("qwen3_moe")
    model = small_files.meta("qwen3_moe")
    model.config.num_key_value_heads = 1
    problems = bind(open_weights(one.gguf), model).problems(small_files.expected(model))
    said = "qwen3moe.attention.head_count_kv is 2 in the GGUF file, the config has num_key_value_heads 1"
    assert problems == [said]


def test_heads_of_keys_by_layer():
    """None where a layer is no attention; latent attention has none of its own."""
    from ktransformers.loaders.bind_gguf import _other_kv_heads

    def said(stored, **config):
        return _other_kv_heads({"x.attention.head_count_kv": stored}, "x", SimpleNamespace(**config))

    assert said([0, 2, 0], num_key_value_heads=2) == said([2, 4], num_key_value_heads=2) == said("?") == []
    assert said(1, num_key_value_heads=4, kv_lora_rank=32) == said(4, num_key_value_heads=None) == []
    assert "is [2, 4] in the GGUF file" in said([0, 2, 4], num_key_value_heads=8)[0]


@pytest.mark.parametrize("change, said", [
    ({"rms_norm_eps": 1e-5}, ["rms_norm_eps is 1e-05 in the config and 1e-06 in the GGUF file"]),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
     ["rope_theta is 500000.0 in the config and 10000 in the GGUF file"]),
    ({"rms_norm_eps": 1.0000001e-6}, []),
])  # fmt: skip
def test_numbers_of_the_config_that_are_not_the_files_are_a_notice(saved, change, said):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        weights, expected = bound(saved("qwen3_moe").gguf, "qwen3_moe", **change)
    assert weights.problems(expected) == []
    assert [str(w.message) for w in told] == [f"{one}; the config's number counts" for one in said]


@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_how_many_experts_a_token_meets_is_the_users_choice(saved, form):
    """Weights are the same for any number: the model computes with the config's, and one notice says so."""
    one = saved("qwen3_moe")
    path = one.gguf if form == "gguf" else one.root / "hf"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ours = optimize_and_load(small_files.meta("qwen3_moe", num_experts_per_tok=1), "Default", path, progress=False)
    notices = [str(w.message) for w in told if "num_experts_per_tok" in str(w.message)]
    said = "num_experts_per_tok is 1 in the config and 2 in the GGUF file; the config's number counts"
    assert notices == ([said] if form == "gguf" else [])
    theirs = AutoModelForCausalLM.from_config(small_files.config("qwen3_moe", num_experts_per_tok=1)).eval()
    theirs.load_state_dict(one.state)
    ids = torch.arange(2, 14)[None]
    with torch.no_grad():
        assert torch.allclose(ours(ids).logits, theirs(ids).logits, atol=1e-4)
        assert not torch.allclose(one.model.eval()(ids).logits, theirs(ids).logits, atol=1e-4)


def test_wrong_and_unknown_architectures(saved, tmp_path):
    """A file of another family, a family without known names, and an unknown architecture are three clear
    errors."""
    mixtral = saved("mixtral").gguf
    with pytest.raises(WeightError, match="architecture 'llama', the model is 'qwen3_moe'.*'qwen3moe'"):
        bound(mixtral, "qwen3_moe")
    strange = small_files.edit_gguf(mixtral, tmp_path / "x.gguf", arch="llamb")
    with pytest.raises(UnsupportedError, match="'llamb' is not known.*did you mean 'llama'.*deepseek2"):
        bound(strange, "mixtral")
    model = small_files.meta("mixtral")
    model.config.model_type = "brandnew"
    with pytest.raises(UnsupportedError, match="'brandnew' models are not known.*qwen3_moe"):
        bind(open_weights(mixtral), model)


@pytest.fixture
def converters(monkeypatch):
    """Call with what transformers' conversion mapping is to be."""
    from transformers import conversion_mapping

    return lambda *found: monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda _: [*found])


def test_conversions_that_only_transformers_knows_run_as_they_do_there(saved, converters, tmp_path):
    """One tensor to one, and one to several; what does not fit together has no shape to compare."""
    from transformers.core_model_loading import Chunk, Transpose, WeightConverter

    one, layer = saved("mixtral"), "model.layers.1.self_attn"
    tensors = {name: tensor.contiguous() for name, tensor in one.state.items()}
    k, v = (tensors.pop(f"{layer}.{name}_proj.weight") for name in "kv")
    tensors[f"{layer}.kv_proj.weight"] = torch.cat([k, v])
    tensors[f"{layer}.q_proj.weight"] = one.state[f"{layer}.q_proj.weight"].T.contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    converters(
        WeightConverter("layers.1.self_attn.q_proj.weight", "layers.1.self_attn.q_proj.weight", [Transpose(0, 1)]),
        WeightConverter("self_attn.kv_proj.weight", [f"self_attn.{n}_proj.weight" for n in "kv"], [Chunk(0)]),
    )
    weights, expected = bound(tmp_path, "mixtral")
    assert weights.problems(expected) == []
    for name in ("q", "k", "v"):
        assert torch.equal(weights.tensor(f"{layer}.{name}_proj.weight"), one.state[f"{layer}.{name}_proj.weight"])
    tensors[f"{layer}.kv_proj.weight"] = torch.zeros(3, 5)
    save_file(tensors, tmp_path / "model.safetensors")
    weights, expected = bound(tmp_path, "mixtral")
    assert any("k_proj.weight: has shape" in problem for problem in weights.problems(expected))


def test_both_spellings_of_one_tensor(saved, tmp_path):
    """Stacked and per-expert weights in one checkpoint are a problem, not a silent choice."""
    one = saved("qwen3_moe")
    tensors = load_file(one.root / "hf" / "model.safetensors")
    tensors[f"{EXPERTS}.down_proj"] = one.state[f"{EXPERTS}.down_proj"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    weights, expected = bound(tmp_path, "qwen3_moe")
    assert any("stacked and per expert" in p for p in weights.problems(expected))


def test_grouping():
    """Equal problems of many layers are one line with ranges; few, or different ones, stay apart, in
    order."""
    many = [
        TensorProblem(f"model.layers.{i}.mlp.gate.weight", f"looked for blk.{i}.ffn.weight") for i in range(3, 61)
    ]
    some = [TensorProblem(f"model.layers.{i}.norm.weight", "[2, 3] is wrong") for i in (1, 5)]
    gaps = [TensorProblem(f"a.{i}.b.{e}.c", "missing") for i in (0, 1, 2, 7) for e in (4, 5)]
    assert grouped(many + some + gaps) == [
        "model.layers.{3-60}.mlp.gate.weight: looked for blk.{3-60}.ffn.weight (58 tensors)",
        "model.layers.1.norm.weight: [2, 3] is wrong",
        "model.layers.5.norm.weight: [2, 3] is wrong",
        "a.{0-2,7}.b.{4-5}.c: missing (8 tensors)",
    ]
