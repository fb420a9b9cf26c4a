"""Every operator alone, and all together, compute what transformers' eager model computes."""

import functools

import pytest
import torch
from transformers import StaticCache

from ktransformers import optimize_and_load
from tests.tiny import YARN, meta_model, random_ids, relative_error, save, tiny_model

OPERATORS = "ktransformers.operators."
MOE_BLOCK = {
    "deepseek_v2": "experts.KDeepseekV2MoE",
    "deepseek_v3": "experts.KDeepseekV3MoE",
    "qwen2_moe": "experts.KQwen2MoeSparseMoeBlock",
    "qwen3_moe": "experts.KQwen3MoeSparseMoeBlock",
    "mixtral": "experts.KMistralSparseMoEBlock",
}
MODEL = {
    "deepseek_v2": "models.KDeepseekV2Model",
    "deepseek_v3": "models.KDeepseekV2Model",
    "qwen3_moe": "models.KQwen3MoeModel",
}
ROTARY = {"deepseek_v2": "RoPE.YarnRotaryEmbedding", "deepseek_v3": "RoPE.YarnRotaryEmbeddingV3"}
MLA_FAMILIES = ("deepseek_v2", "deepseek_v3")


def rule(name, operator, recursive=True, **kwargs):
    devices = {} if "generate_device" in kwargs else {"generate_device": "cpu"}
    return {
        "match": {"name": name},
        "replace": {"class": OPERATORS + operator, "kwargs": {**devices, **kwargs}},
        "recursive": recursive,
    }


def rules_for(family, *parts):
    """Rules that replace the named parts of a model."""
    both = {"generate_device": "cpu", "prefill_device": "cpu"}
    experts, linear = r"\.mlp\.experts$", r"(_proj|_proj_with_mqa|shared_expert_gate|lm_head)$"
    known = {
        "model": rule(r"^model$", MODEL.get(family, "models.KQwen2MoeModel"), transfer_map={"1": "cpu"}),
        "rope": rule(r"^model\.rotary_emb$", ROTARY.get(family, "RoPE.RotaryEmbedding")),
        "attention": rule(r"\.self_attn$", "attention.KDeepseekV2Attention", chunck_size=5),
        "gate": rule(r"\.mlp\.gate$", "gate.KMoEGate"),
        "experts": rule(experts, "experts.KTransformersExperts", generate_op="KExpertsCPU", **both),
        "experts_torch": rule(experts, "experts.KTransformersExperts", generate_op="KExpertsTorch", **both),
        "moe": rule(r"\.layers\.[12]\.mlp$" if family in MLA_FAMILIES else r"\.mlp$", MOE_BLOCK[family]),
        "linear": rule(linear, "linear.KTransformersLinear", **both),
        "linear_torch": rule(linear, "linear.KTransformersLinear", generate_op="KLinearTorch", **both),
        "linear_inject": rule(linear, "linear.LinearTorchInject", my_param=False),
    }
    return [known[part] for part in parts]


def all_parts(family):
    attention = ["attention"] if family in MLA_FAMILIES else []
    return ["model", "rope", *attention, "gate", "experts", "moe", "linear"]


def build(checkpoint, family, *parts, **overrides):
    """(transformers' model, the same checkpoint with `parts` replaced)."""
    reference, folder = checkpoint(family, **overrides)
    model, rules = meta_model(reference.config), rules_for(family, *parts)
    return reference, optimize_and_load(model, rules, folder, default_device="cpu", progress=False)


@pytest.fixture(scope="module")
def together(checkpoint):
    """Call with a family: (transformers' model, its twin of operators, transformers' answer to `PROMPT`)."""

    @functools.cache
    def make(family):
        reference, model = build(checkpoint, family, *all_parts(family))
        return reference, model, reference.generate(PROMPT, max_new_tokens=32, do_sample=False)

    return make


PROMPT = random_ids(1, 11)
EXPERTS_AND_LINEAR = ["experts", "experts_torch", "linear", "linear_torch", "linear_inject"]
ALONE = ["model", "rope", "gate", "moe", *EXPERTS_AND_LINEAR]


@pytest.mark.parametrize("part", ALONE)
def test_an_operator_alone_gives_the_same_logits(checkpoint, family, part):
    reference, model = build(checkpoint, family, part)
    ids = random_ids(2, 13)
    with torch.no_grad():
        assert relative_error(model(ids).logits, reference(ids).logits) < 1e-4


@pytest.mark.parametrize(
    "overrides", [{}, {"rope_parameters": YARN}, {"q_lora_rank": None}, {"attention_bias": True}], ids=str
)
@pytest.mark.parametrize("mla_family", MLA_FAMILIES)
def test_attention_alone_gives_the_same_logits(checkpoint, mla_family, overrides):
    reference, model = build(checkpoint, mla_family, "attention", **overrides)
    ids = random_ids(2, 13)
    with torch.no_grad():
        assert relative_error(model(ids).logits, reference(ids).logits) < 1e-4


def test_bf16_is_as_near_to_fp32_as_transformers_bf16_is(family, tmp_path):
    reference = tiny_model(family)
    in_fp32 = {
        name: buffer.clone() for name, buffer in reference.named_buffers()
    }  # as from_pretrained keeps them
    reference = reference.to(torch.bfloat16)
    for name, buffer in in_fp32.items():
        setattr(reference.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], buffer)
    folder, ids = save(reference, tmp_path), random_ids(2, 13)
    model = optimize_and_load(
        meta_model(reference.config).to(torch.bfloat16),
        rules_for(family, *all_parts(family)),
        folder,
        default_device="cpu",
        progress=False,
    )
    with torch.no_grad():
        ours, theirs = model(ids).logits, reference(ids).logits
        exact = reference.float()(ids).logits
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - exact).abs().mean() < 1.5 * (theirs.float() - exact).abs().mean()


def test_torch_operators_pass_the_same_gradients(checkpoint, family):
    parts = [part for part in all_parts(family) if part not in ("experts", "linear")]
    reference, model = build(checkpoint, family, *parts, "experts_torch", "linear_torch")
    for one in (reference, model):
        one.zero_grad()
        one(PROMPT).logits.square().mean().backward()
    expected = dict(reference.named_parameters())
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert "model.embed_tokens.weight" in found and any(name.endswith("mlp.gate.weight") for name in found)
    assert max(relative_error(grad, expected[name].grad) for name, grad in found.items()) < 1e-3


@pytest.mark.parametrize("part", ["gate", "linear_torch"])
def test_tied_embeddings_are_one_tensor(checkpoint, part):
    reference, model = build(checkpoint, "qwen3_moe", part, tie_word_embeddings=True)
    with torch.no_grad():
        assert relative_error(model(PROMPT).logits, reference(PROMPT).logits) < 1e-4
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_all_together_give_the_same_logits_and_names(together, family):
    reference, model, _ = together(family)
    ids = random_ids(2, 13)
    with torch.no_grad():
        assert relative_error(model(ids).logits, reference(ids).logits) < 1e-4
    assert set(model.state_dict()) <= set(reference.state_dict())
    assert model.dtype == torch.float32 and model.device.type == "cpu"


@pytest.mark.parametrize(
    "options", [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}], ids=str
)
def test_greedy_tokens_are_equal(together, family, options):
    _, model, expected = together(family)
    assert torch.equal(model.generate(PROMPT, max_new_tokens=32, do_sample=False, **options), expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_padded_batch_equals_its_sequences_alone(together, family, attention):
    reference, model, _ = together(family)
    model.set_attn_implementation(attention)
    short, long = random_ids(1, 5, seed=3), random_ids(1, 12, seed=4)
    ids = torch.cat([torch.nn.functional.pad(short, (7, 0)), long])
    mask = (torch.arange(12) >= torch.tensor([[7], [0]])).long()
    out = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)[:, 12:]
    for row, alone in zip(out, (short, long), strict=True):
        assert torch.equal(
            row, reference.generate(alone, max_new_tokens=8, do_sample=False)[0, alone.shape[1] :]
        )


def test_chunked_prefill_with_a_static_cache_equals_one_shot(together, family):
    reference, model, _ = together(family)
    ids = random_ids(1, 11)
    cache = StaticCache(config=model.config, max_cache_len=24)
    with torch.no_grad():
        pieces = [model(piece, past_key_values=cache).logits for piece in ids.split([4, 1, 6], dim=1)]
        assert relative_error(torch.cat(pieces, 1), reference(ids).logits) < 1e-4


def test_router_logits_attentions_and_hidden_states_are_recorded(together, family):
    reference, model, _ = together(family)
    ids = random_ids(1, 7)
    wanted = {"output_router_logits": True, "output_attentions": True, "output_hidden_states": True}
    model.set_attn_implementation("eager")
    with torch.no_grad():
        ours, theirs = model(ids, **wanted), reference(ids, **wanted)
    assert set(ours) == set(theirs)  # transformers 5.17 records no router logits of DeepSeek yet
    for name in {"router_logits", "attentions", "hidden_states"} & set(theirs):
        found, expected = ours[name], theirs[name]
        assert len(found) == len(expected) > 0
        assert max(relative_error(f, e) for f, e in zip(found, expected, strict=True)) < 1e-4, name
