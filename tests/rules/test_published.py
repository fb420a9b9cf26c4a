"""Rule files in the style upstream published load and run as they are, on today's classes.

Three tables say what becomes of every class and kwarg that those files use; then whole files, written out here in the
published shapes, run on tiny models with every GPU renamed to the CPU. Truth is transformers' own model.
"""

import warnings
from dataclasses import dataclass, field

import pytest
import torch
import yaml

from ktransformers import optimize_and_load, plan
from ktransformers.errors import RuleError
from ktransformers.operators import base_operator
from ktransformers.rules import classes
from tests.tiny import YARN, meta_model, random_ids, relative_error

CPU = {"cuda": "cpu", **{f"cuda:{i}": "cpu" for i in range(8)}}
OPERATORS = "ktransformers.operators."
MODELS = "ktransformers.models."


def rule(operator, name=None, cls=None, recursive=True, **kwargs):
    match = {key: value for key, value in (("name", name), ("class", cls)) if value is not None}
    operator = operator if operator == "default" else OPERATORS + operator
    made = {"match": match, "replace": {"class": operator, "kwargs": kwargs}}
    return made if recursive else {**made, "recursive": False}


def on(device, prefill=None):
    return {"generate_device": device, "prefill_device": prefill or device}


def check_equal(checkpoint, family, rules, **overrides):
    """Load the family's tiny model with `rules`; its logits must be transformers'. Returns the model."""
    reference, folder = checkpoint(family, **overrides)
    model = optimize_and_load(meta_model(reference.config), rules, folder, devices=CPU, progress=False)
    ids = random_ids(2, 9)
    with torch.no_grad():
        assert relative_error(model(ids).logits, reference(ids).logits) < 1e-4
    return model


# --- every class ------------------------------------------------------------------------------------------------------

EXPERTS, BLOCK, MLP, GATE = r"\.mlp\.experts$", r"\.mlp$", r"\.shared_expert$", r"\.mlp\.gate$"
ATTENTION, NORM, ROTARY, MODEL = r"\.self_attn$", "norm$", r"^model\.rotary_emb$", "^model$"
RESOLVED = {
    "default": ("qwen3_moe", "^lm_head"),
    "linear.KTransformersLinear": ("qwen3_moe", "_proj$"),
    "experts.KTransformersExperts": ("qwen3_moe", EXPERTS),
    "experts.KTransformersExpertsV2": ("qwen3_moe", EXPERTS),
    "experts.KGlm4Experts": ("glm4_moe", EXPERTS),
    "experts.KSmallthinkerExperts": ("qwen3_moe", EXPERTS),
    "attention.KDeepseekV2Attention": ("deepseek_v3", ATTENTION),
    "attention.KLlamaAttention": ("llama", ATTENTION),
    "attention.KQwen3MoeAttention": ("qwen3_moe", ATTENTION),
    "balance_serve_attention.flashinfer_attn": ("deepseek_v3", ATTENTION),
    "balance_serve_attention.deepseek_torch_attn": ("deepseek_v2", ATTENTION),
    "balance_serve_attention.KQwen2MoeAttention": ("qwen2_moe", ATTENTION),
    "balance_serve_attention.KQwen3MoeAttention": ("qwen3_moe", ATTENTION),
    "balance_serve_attention.KGlm4MoeAttention": ("glm4_moe", ATTENTION),
    "balance_serve_attention.KSmallthinkerAttention": ("mixtral", ATTENTION),
    "balance_serve_attention.KQwen3NextAttention": ("qwen3_next", ATTENTION),
    "balance_serve_attention.KQwen3NextGatedDeltaNet": ("qwen3_next", r"\.linear_attn$"),
    "experts.KDeepseekV2MoE": ("deepseek_v2", r"layers\.[12]\.mlp$"),
    "experts.KDeepseekV3MoE": ("deepseek_v3", r"layers\.[12]\.mlp$"),
    "experts.KDeepseekV3MoEV2": ("deepseek_v3", r"layers\.[12]\.mlp$"),
    "experts.KQwen2MoeSparseMoeBlock": ("qwen2_moe", BLOCK),
    "experts.KQwen2MoeSparseMoeBlockV2": ("qwen2_moe", BLOCK),
    "experts.KQwen3MoeSparseMoeBlock": ("qwen3_moe", BLOCK),
    "experts.KQwen3MoeSparseMoeBlockV2": ("qwen3_moe", BLOCK),
    "experts.KQwen3NextSparseMoeBlockV2": ("qwen3_next", BLOCK),
    "experts.KMistralSparseMoEBlock": ("mixtral", r"\.block_sparse_moe$"),
    "experts.KGlm4MoeMoE": ("glm4_moe", r"layers\.1\.mlp$"),
    "experts.KSmallthinkerMoeBlock": ("qwen3_moe", BLOCK),
    "gate.KMoEGate": ("deepseek_v3", GATE),
    "gate.KMoEGateQwen2Moe": ("qwen2_moe", GATE),
    "RoPE.RotaryEmbedding": ("qwen2_moe", ROTARY),
    "RoPE.RotaryEmbeddingV2": ("llama", ROTARY),
    "RoPE.RotaryEmbeddingV3": ("deepseek_v3", ROTARY),
    "RoPE.RotaryEmbeddingV4": ("deepseek_v3", ROTARY),
    "RoPE.YarnRotaryEmbedding": ("deepseek_v2", ROTARY),
    "RoPE.YarnRotaryEmbeddingV3": ("deepseek_v3", ROTARY),
    "RoPE.DynamicNTKScalingRotaryEmbedding": ("mixtral", ROTARY),
    "RoPE.KQwen3MoeRotaryEmbedding": ("qwen3_next", ROTARY),
    "RoPE.KGlm4MoeRotaryEmbedding": ("glm4_moe", ROTARY),
    "RoPE.KSmallthinkerRotaryEmbedding": ("mixtral", ROTARY),
    "layernorm.RMSNorm": ("deepseek_v3", NORM),
    "layernorm.DeepseekV3RMSNormTorch": ("deepseek_v3", NORM),
    "layernorm.KQwen2MoeRMSNorm": ("qwen2_moe", NORM),
    "layernorm.KQwen3MoeRMSNorm": ("qwen3_moe", NORM),
    "layernorm.KQwen3NextRMSNorm": ("qwen3_next", "layernorm$"),
    "layernorm.KGlm4MoeRMSNorm": ("glm4_moe", NORM),
    "layernorm.KSmallthinkerRMSNorm": ("mixtral", NORM),
    "mlp.kDeepseekV3MLP": ("deepseek_v3", r"layers\.0\.mlp$|shared_experts$"),
    "mlp.KQwen2MoeMLP": ("qwen2_moe", MLP),
    "mlp.KGlm4MoeMLP": ("glm4_moe", r"layers\.0\.mlp$|shared_experts$"),
    "mlp.KSmallthinkerDenseMlpBlock": ("llama", BLOCK),
    "models.KDeepseekV2Model": ("deepseek_v2", MODEL),
    "models.KQwen2MoeModel": ("qwen2_moe", MODEL),
    "models.KQwen3MoeModel": ("qwen3_moe", MODEL),
    "models.KQwen3NextModel": ("qwen3_next", MODEL),
    "models.KGlm4MoeModel": ("glm4_moe", MODEL),
    "models.KSmallThinkerModel": ("mixtral", MODEL),
    "models.KMixtralModel": ("mixtral", MODEL),
    "models.KLlamaModel": ("llama", MODEL),
    # names of older files
    "layer_wise_prefill.KQwen2MoeModel": ("qwen2_moe", MODEL),
    "attention.KDeepseekV3Attention": ("deepseek_v3", ATTENTION),
    "attention.flashinfer_attn": ("deepseek_v3", ATTENTION),
    "gate.KMoEGateDeepSeekV3": ("deepseek_v3", GATE),
}
"""Operator -> a family and the modules of it that it takes."""

NPU, XPU = "Ascend NPUs are not supported; name the class", "Intel's IPEX-LLM is not supported; name the class"
REFUSED = {
    OPERATORS + "ascend.ascend_linear.KTransformersLinearW8A8A2": NPU,
    OPERATORS + "ascend.ascend_experts.KTransformersExpertsW8A8": NPU,
    OPERATORS + "ascend.ascend_attention.KDeepseekV2AttentionW8A8A2Serve": NPU,
    OPERATORS + "gate.KMoEGateIPEXLLM": XPU,
    OPERATORS + "layernorm.KDeepseekRMSNormIPEXLLM": XPU,
    OPERATORS + "attention.KQwen3MoeAttentionIPEXLLM": XPU,
    MODELS + "modeling_smallthinker.SmallthinkerMoeBlock": "transformers has no SmallThinker model.*use a family",
}

MATCHED = {
    "modeling_deepseek": ("DeepseekV2YarnRotaryEmbedding", "DeepseekV2RotaryEmbedding", "DeepseekV2MoE", "DeepseekV2RMSNorm",
                          "DeepseekV2MLP", "DeepseekV2Model", "MoEGate"),
    "modeling_deepseek_v3": ("DeepseekV3RotaryEmbedding", "DeepseekV3YarnRotaryEmbedding", "DeepseekV3MoE", "MoEGate",
                             "DeepseekV3RMSNorm", "DeepseekV3MLP", "DeepseekV3Model"),
    "modeling_deepseekv3": ("DeepseekV3MoE", "MoEGate"),  # in older files
    "modeling_qwen2_moe": ("Qwen2MoeRotaryEmbedding", "Qwen2MoeSparseMoeBlock", "Qwen2MoeRMSNorm", "Qwen2MoeMLP"),
    "modeling_qwen3_moe": ("Qwen3MoeRotaryEmbedding", "Qwen3MoeSparseMoeBlock", "Qwen3MoeRMSNorm", "Qwen3MoeMLP"),
    "modeling_qwen3_next": ("Qwen3NextRotaryEmbedding", "Qwen3NextSparseMoeBlock", "Qwen3NextRMSNorm", "Qwen3NextMLP",
                            "Qwen3NextAttention", "Qwen3NextGatedDeltaNet"),
    "modeling_glm4_moe": ("Glm4MoeRotaryEmbedding", "Glm4MoeMoE", "Glm4MoeRMSNorm", "Glm4MoeMLP"),
    "modeling_mixtral": ("MixtralRotaryEmbedding", "MixtralSparseMoeBlock"),
    "modeling_llama": ("LlamaRotaryEmbedding", "LlamaModel"),
}  # fmt: skip
"""Module of ktransformers.models -> the classes in it that files match on."""


@pytest.mark.parametrize("name", RESOLVED)
def test_an_operator_of_a_published_file_resolves_and_runs(checkpoint, name):
    family, modules = RESOLVED[name]
    model = check_equal(checkpoint, family, [rule(name, modules, **on("cuda"))])
    taken = [module for module in model.modules() if isinstance(module, base_operator.BaseInjectedModule)]
    assert bool(taken) is (name != "default")


@pytest.mark.parametrize("name", REFUSED)
def test_a_class_that_cannot_be_meant_here_is_refused_with_what_to_name_instead(name):
    with pytest.raises(RuleError, match=REFUSED[name]):
        plan(torch.nn.Linear(2, 2), [{"match": {"class": name}, "replace": {"class": "default"}}])


@pytest.mark.parametrize("name", [f"{module}.{cls}" for module, classes in MATCHED.items() for cls in classes])
def test_a_class_that_published_files_match_on_is_transformers_own(name):
    found, problem = classes.find_class(MODELS + name)
    assert problem == "" and found.__module__.startswith("transformers.models.")


# --- every kwarg ------------------------------------------------------------------------------------------------------

LINEAR, WRAPPER, MLA, DECODER = (
    "linear.KTransformersLinear",
    "experts.KTransformersExperts",
    "attention.KDeepseekV2Attention",
    "models.KDeepseekV2Model",
)
KWARGS = [
    *[(LINEAR, "generate_device", device, "") for device in ("cuda", "cuda:0", "cuda:7", "cpu")],
    (LINEAR, "prefill_device", "cuda:1", ""),
    (LINEAR, "prefill_device", "npu:0", "'npu:0' is no device name"),
    (LINEAR, "generate_device", "xpu", "'xpu' does not exist"),
    (LINEAR, "out_device", "cuda", ""),
    *[(LINEAR, "generate_op", op, "") for op in ("KLinearMarlin", "VLinearMarlin", "KLinearFP8", "KLinearCPUInfer")],
    *[(LINEAR, "generate_op", op, "") for op in ("KLinearTorch", "KLinearQ8")],
    (LINEAR, "generate_op", "KLinearTorchW8A8A2", "'KLinearTorchW8A8A2' unknown.*known: KLinearTorch, KLinearCPUInfer"),
    *[(LINEAR, "prefill_op", op, "") for op in ("KLinearTorch", "None", None)],
    *[(WRAPPER, "generate_op", op, "") for op in ("KExpertsCPU", "KExpertsMarlin", "KExpertsTorch", "KSFTExpertsCPU")],
    (WRAPPER, "generate_op", "KExpertsCPUW8A8", "'KExpertsCPUW8A8' unknown.*known: KExpertsTorch, KExpertsCPU"),
    *[(WRAPPER, "prefill_op", op, "") for op in ("KExpertsTorch", "None")],
    (WRAPPER, "out_device", "cuda:1", ""),
    *[(WRAPPER, "backend", backend, "") for backend in ("AMXInt8", "AMXBF16", "llamafile")],
    (WRAPPER, "backend", "AMXInt5", "'AMXInt5' unknown.*known: BF16"),
    *[(MLA, "absorb_for_prefill", absorb, "") for absorb in (False, True)],
    (DECODER, "per_layer_prefill_intput_threshold", 0, ""),
    (DECODER, "per_layer_prefill_intput_threshold", 30000, "layer-wise prefill is not built; found 30000, expected 0"),
    (DECODER, "transfer_map", {1: "cuda:1", 2: "cuda:2"}, ""),
    (DECODER, "transfer_map", {1: "cpu"}, ""),
    (DECODER, "transfer_map", {30: "cuda:1"}, "layer 30 does not exist; the model has layers 0 to 2"),
    (DECODER, "device", "cuda", ""),
    (LINEAR, "dump_enable", True, "kwarg 'dump_enable' unknown to KTransformersLinear"),
    (LINEAR, "dump_dir", "/tmp", "kwarg 'dump_dir' unknown to KTransformersLinear"),
]
MATCHES = {LINEAR: "o_proj$", WRAPPER: EXPERTS, MLA: ATTENTION, DECODER: MODEL}


@pytest.mark.parametrize(("operator", "kwarg", "value", "message"), KWARGS, ids=str)
def test_a_kwarg_of_a_published_file_works_or_says_what_to_do(checkpoint, operator, kwarg, value, message):
    devices = {"generate_device": "cpu"} if operator == WRAPPER else on("cuda")
    rules = [rule(operator, MATCHES[operator], **{**devices, kwarg: value})]
    if not message:
        check_equal(checkpoint, "deepseek_v3", rules)
        return
    with pytest.raises(RuleError, match=message):
        check_equal(checkpoint, "deepseek_v3", rules)


# --- whole files ------------------------------------------------------------------------------------------------------


@dataclass
class Style:
    """What one published file says, in its own words. `ranges`: (expression for layer numbers, device) per GPU."""

    family: str
    modeling: str
    rotary: tuple[str, str]
    block: tuple[str | None, str]
    attention: str | None = "attention.KDeepseekV2Attention"
    model: str | None = "models.KDeepseekV2Model"
    gate: str | None = None
    norm: tuple[str, str] | None = None
    mlp: tuple[str, str] | None = None
    linear_op: str = "KLinearMarlin"
    head_op: str | None = "KLinearMarlin"
    experts: str = "experts.KTransformersExperts"
    experts_kwargs: dict = field(default_factory=dict)
    attention_kwargs: dict = field(default_factory=dict)
    not_linear: str = r".*self_attn\.kv_b_proj"
    block_name: str = "mlp"
    ranges: list = field(default_factory=lambda: [(".*", "cuda")])
    transfer_map: dict | None = None
    more: list = field(default_factory=list)
    overrides: dict = field(default_factory=dict)

    def rules(self):
        """The file's rules: each part once per range, the parts in the order upstream has them."""
        split = len(self.ranges) > 1
        parts = [self._rotary, self._linear, self._block, self._gate, self._experts, self._attention]
        rules = [made for part in parts for numbers, device in self.ranges for made in part(numbers, device, split)]
        if self.head_op:
            rules.append(rule(LINEAR, "^lm_head", "torch.nn.Linear", **on(self.ranges[-1][1]), **self._ops(self.head_op)))
        if self.model:
            transfers = {"transfer_map": self.transfer_map} if self.transfer_map else {}
            rules.append(rule(self.model, MODEL, per_layer_prefill_intput_threshold=0, **transfers))
        rules.append(rule("default", "^model.embed_tokens", **on("cpu")))
        for part in (self.norm, self.mlp):
            rules += [rule(part[1], None, self._class(part[0]), **on(self.ranges[0][1]))] if part else []
        rules += self.more
        if split:
            rules += [rule("default", rf"^model\.layers\.{numbers}\.", **on(device)) for numbers, device in self.ranges]
            rules.append(rule("default", "(^model.norm)|(^lm_head)", **on(self.ranges[-1][1])))
        return rules

    def _class(self, name):
        return name if name is None or "." in name else f"{MODELS}{self.modeling}.{name}"

    @staticmethod
    def _ops(op):
        return {"generate_op": op, "prefill_op": "KLinearTorch"}

    def _rotary(self, numbers, device, split):
        cls, operator = self.rotary
        yield rule(operator, rf"^model\.layers\.{numbers}\." if split else None, self._class(cls), **on(device))

    def _linear(self, numbers, device, split):
        name = rf"^model\.layers\.{numbers}\.(?!{self.not_linear}).*$" if split else rf"^model\.layers\.(?!{self.not_linear}).*$"
        yield rule(LINEAR, name, "torch.nn.Linear", **on(device), **self._ops(self.linear_op))

    def _block(self, numbers, device, split):
        cls, operator = self.block
        yield rule(operator, rf"^model\.layers\.{numbers}\.{self.block_name}$", self._class(cls), **on(device))

    def _gate(self, numbers, device, split):
        if self.gate:
            name = rf"^model\.layers\.{numbers}\.mlp\.gate$" if split else None
            yield rule("gate.KMoEGate", name, self._class(self.gate), **on(device))

    def _experts(self, numbers, device, split):
        kwargs = {"prefill_device": device, "prefill_op": "KExpertsTorch", "generate_device": "cpu",
                  "generate_op": "KExpertsCPU", "out_device": device} | self.experts_kwargs  # fmt: skip
        yield rule(self.experts, rf"^model\.layers\.{numbers}\.{self.block_name}\.experts$", recursive=False, **kwargs)

    def _attention(self, numbers, device, split):
        if self.attention:
            yield rule(self.attention, rf"^model\.layers\.{numbers}\.self_attn$", **on(device), **self.attention_kwargs)


V3 = {"modeling": "modeling_deepseek_v3", "rotary": ("DeepseekV3RotaryEmbedding", "RoPE.YarnRotaryEmbeddingV3"),
      "block": ("DeepseekV3MoE", "experts.KDeepseekV3MoE"), "gate": "MoEGate", "attention_kwargs": {"absorb_for_prefill": False}}  # fmt: skip
V2 = {"modeling": "modeling_deepseek", "rotary": ("DeepseekV2YarnRotaryEmbedding", "RoPE.YarnRotaryEmbedding"),
      "block": ("DeepseekV2MoE", "experts.KDeepseekV2MoE")}  # fmt: skip
SERVE = {"head_op": "VLinearMarlin", "linear_op": "VLinearMarlin", "experts": "experts.KTransformersExpertsV2"}
SERVE_V3 = {**SERVE, "attention": "balance_serve_attention.flashinfer_attn", "block": ("DeepseekV3MoE", "experts.KDeepseekV3MoEV2"),
            "norm": ("DeepseekV3RMSNorm", "layernorm.RMSNorm"), "mlp": ("DeepseekV3MLP", "mlp.kDeepseekV3MLP")}  # fmt: skip
NO_SHARED_GATE = r".*mlp\.shared_expert_gate"
TWO = {"ranges": [("(0|[1-2])", "cuda:0"), ("([3-5])", "cuda:1")], "transfer_map": {3: "cuda:1"}, "overrides": {"num_hidden_layers": 6}}
FOUR = {"ranges": [("(0|1)", "cuda:0"), ("([2-3])", "cuda:1"), ("([4-5])", "cuda:2"), ("([6-7])", "cuda:3")],
        "transfer_map": {2: "cuda:1", 4: "cuda:2", 6: "cuda:3"}, "overrides": {"num_hidden_layers": 8}}  # fmt: skip
EIGHT = {"ranges": [(f"({2 * i}|{2 * i + 1})", f"cuda:{i}") for i in range(8)],
         "transfer_map": {2 * i: f"cuda:{i}" for i in range(1, 8)}, "overrides": {"num_hidden_layers": 16}}  # fmt: skip
QWEN3 = {"modeling": "modeling_qwen3_moe", "not_linear": NO_SHARED_GATE, "attention": None,
         "rotary": (MODELS + "modeling_qwen2_moe.Qwen2MoeRotaryEmbedding", "RoPE.RotaryEmbedding")}  # fmt: skip

STYLES = {
    "DeepSeek-V3": Style("deepseek_v3", **V3, overrides={"rope_parameters": YARN}),
    "DeepSeek-V3 amx": Style("deepseek_v3", **V3, experts_kwargs={"backend": "AMXInt8"}),
    "DeepSeek-V3 fp8": Style("deepseek_v3", **V3, linear_op="KLinearFP8"),
    "DeepSeek-V3 serve": Style("deepseek_v3", **{**V3, **SERVE_V3}, experts_kwargs={"backend": "AMXBF16"}),
    "DeepSeek-V3 two GPUs": Style("deepseek_v3", **V3, **TWO),
    "DeepSeek-V3 two GPUs, classes of V2": Style(
        "deepseek_v3", **{**V3, "rotary": (MODELS + "modeling_deepseek.DeepseekV2YarnRotaryEmbedding", "RoPE.YarnRotaryEmbedding"),
                          "modeling": "modeling_deepseekv3", "attention": "attention.KDeepseekV3Attention", "attention_kwargs": {}}, **TWO),
    "DeepSeek-V3 two GPUs, experts on them": Style("deepseek_v3", **V3, **TWO, experts_kwargs={"generate_device": "cuda:0", "generate_op": "KExpertsMarlin"}),
    "DeepSeek-V3 four GPUs": Style("deepseek_v3", **V3, **FOUR),
    "DeepSeek-V3 eight GPUs": Style("deepseek_v3", **V3, **EIGHT),
    "DeepSeek-V3 sft": Style("deepseek_v3", **V3, linear_op="KLinearTorch", head_op="KLinearTorch", experts_kwargs={"generate_op": "KSFTExpertsCPU", "backend": "AMXInt8"}),
    "Kimi-K2 serve": Style("deepseek_v3", **{**V3, **SERVE_V3}, overrides={"n_group": 1, "topk_group": 1}),
    "Moonlight serve": Style("deepseek_v3", **{**V3, **SERVE_V3, "rotary": ("DeepseekV3RotaryEmbedding", "RoPE.RotaryEmbeddingV4")}, overrides={"q_lora_rank": None, "n_group": 1, "topk_group": 1}),
    "DeepSeek-V2": Style("deepseek_v2", **V2, head_op=None),
    "DeepSeek-V2-Lite": Style("deepseek_v2", **V2, not_linear=".*self_attn", overrides={"q_lora_rank": None, "rope_parameters": YARN}),
    "DeepSeek-V2-Lite GPU, then CPU": Style("deepseek_v2", **V2, gate=MODELS + "modeling_deepseek_v3.MoEGate", not_linear="self_attn",
                                            ranges=[("(0|[1-2])", "cuda:0"), ("([3-5])", "cpu")], transfer_map={3: "cpu"}, overrides={"num_hidden_layers": 6, "q_lora_rank": None}),
    "DeepSeek-V2 two GPUs": Style("deepseek_v2", **V2, **TWO),
    "Qwen2-57B": Style("qwen2_moe", "modeling_qwen2_moe", ("Qwen2MoeRotaryEmbedding", "RoPE.RotaryEmbedding"), ("Qwen2MoeSparseMoeBlock", "experts.KQwen2MoeSparseMoeBlock"),
                       attention=None, model="models.KQwen2MoeModel", not_linear="nothing", head_op=None),
    "Qwen2-57B two GPUs": Style("qwen2_moe", "modeling_qwen2_moe", ("Qwen2MoeRotaryEmbedding", "RoPE.RotaryEmbedding"), ("Qwen2MoeSparseMoeBlock", "experts.KQwen2MoeSparseMoeBlock"),
                                attention=None, model="layer_wise_prefill.KQwen2MoeModel", head_op=None, **TWO,
                                more=[rule(LINEAR, r"^model\.layers\.([012])$", "torch.nn.Linear", **on("cuda:0"))]),
    "Qwen2-57B serve": Style("qwen2_moe", "modeling_qwen2_moe", ("Qwen2MoeRotaryEmbedding", "RoPE.RotaryEmbedding"), ("Qwen2MoeSparseMoeBlock", "experts.KQwen2MoeSparseMoeBlockV2"),
                             attention="balance_serve_attention.KQwen2MoeAttention", model="models.KQwen2MoeModel", not_linear=NO_SHARED_GATE,
                             norm=("Qwen2MoeRMSNorm", "layernorm.KQwen2MoeRMSNorm"), mlp=("Qwen2MoeMLP", "mlp.KQwen2MoeMLP"), **SERVE),
    "Qwen3-30B": Style("qwen3_moe", **QWEN3, block=("Qwen3MoeSparseMoeBlock", "experts.KQwen3MoeSparseMoeBlock"), model=None, head_op="VLinearMarlin"),
    "Qwen3-30B serve amx": Style("qwen3_moe", **{**QWEN3, **SERVE, "attention": "balance_serve_attention.KQwen3MoeAttention"}, block=("Qwen3MoeSparseMoeBlock", "experts.KQwen3MoeSparseMoeBlockV2"),
                                 model="models.KQwen2MoeModel", norm=("Qwen3MoeRMSNorm", "layernorm.KQwen3MoeRMSNorm"), mlp=("Qwen3MoeMLP", "mlp.KQwen2MoeMLP"), experts_kwargs={"backend": "AMXInt8"}),
    "Qwen3-30B sft": Style("qwen3_moe", **{**QWEN3, "rotary": ("transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeRotaryEmbedding", "RoPE.KQwen3MoeRotaryEmbedding"),
                                           "attention": "attention.KQwen3MoeAttention"}, block=("Qwen3MoeSparseMoeBlock", "experts.KQwen3MoeSparseMoeBlock"),
                           model="models.KQwen3MoeModel", linear_op="KLinearTorch", experts_kwargs={"generate_op": "KSFTExpertsCPU"}),
    "Qwen3-30B sft amx": Style("qwen3_moe", **{**QWEN3, "attention": "attention.KQwen3MoeAttention"}, block=(None, "experts.KQwen3MoeSparseMoeBlock"), model="models.KQwen2MoeModel",
                               linear_op="KLinearTorch", head_op="KLinearTorch", experts_kwargs={"generate_op": "KSFTExpertsCPU", "backend": "AMXInt8"}, more=[rule("models.KQwen3MoeModel", MODEL)]),
    "Qwen3-Next serve": Style("qwen3_next", "modeling_qwen3_next", ("Qwen3NextRotaryEmbedding", "RoPE.KQwen3MoeRotaryEmbedding"), ("Qwen3NextSparseMoeBlock", "experts.KQwen3NextSparseMoeBlockV2"),
                              attention=None, model=None, not_linear=NO_SHARED_GATE, norm=("Qwen3NextRMSNorm", "layernorm.KQwen3NextRMSNorm"), mlp=("Qwen3NextMLP", "mlp.KQwen2MoeMLP"),
                              more=[rule("balance_serve_attention.KQwen3NextGatedDeltaNet", None, MODELS + "modeling_qwen3_next.Qwen3NextGatedDeltaNet", **on("cuda")),
                                    rule("balance_serve_attention.KQwen3NextAttention", None, MODELS + "modeling_qwen3_next.Qwen3NextAttention", **on("cuda"))], **SERVE),
    "GLM-4 serve": Style("glm4_moe", "modeling_glm4_moe", ("Glm4MoeRotaryEmbedding", "RoPE.KGlm4MoeRotaryEmbedding"), ("Glm4MoeMoE", "experts.KGlm4MoeMoE"),
                         attention="balance_serve_attention.KGlm4MoeAttention", model=None, not_linear=NO_SHARED_GATE, norm=("Glm4MoeRMSNorm", "layernorm.KGlm4MoeRMSNorm"),
                         mlp=("Glm4MoeMLP", "mlp.KGlm4MoeMLP"), experts="experts.KGlm4Experts", experts_kwargs={"prefill_op": "None"}, head_op="VLinearMarlin"),
    "Mixtral": Style("mixtral", "modeling_mixtral", ("MixtralRotaryEmbedding", "RoPE.RotaryEmbedding"), ("MixtralSparseMoeBlock", "experts.KMistralSparseMoEBlock"),
                     attention=None, model="models.KQwen2MoeModel", not_linear="nothing", head_op=None, block_name="block_sparse_moe"),
}  # fmt: skip


@pytest.fixture
def written(tmp_path):
    """Call with a list of rules: the path of a file that holds them."""

    def write(rules):
        path = tmp_path / "rules.yaml"
        path.write_text(yaml.safe_dump(rules, sort_keys=False))
        return path

    return write


@pytest.mark.parametrize("name", STYLES)
def test_a_file_of_the_published_style_computes_what_transformers_computes(checkpoint, written, name):
    style = STYLES[name]
    model = check_equal(checkpoint, style.family, written(style.rules()), **style.overrides)
    taken = {type(module).__name__ for module in model.modules()}
    assert {style.experts.rpartition(".")[2], style.block[1].rpartition(".")[2], "KTransformersLinear"} <= taken


def test_llama_with_long_context_says_that_attention_is_exact(checkpoint, written):
    base_operator._told.clear()
    rules = [
        rule("RoPE.RotaryEmbeddingV2", None, MODELS + "modeling_llama.LlamaRotaryEmbedding"),
        rule("attention.KLlamaAttention", r"^model\.layers\..*\.self_attn$", **on("cuda")),
        rule("models.KLlamaModel", MODEL, per_layer_prefill_intput_threshold=0),
        rule("default", "^model.embed_tokens", **on("cpu")),
    ]
    with pytest.warns(UserWarning, match="KLlamaAttention: the block-sparse attention for long contexts is not built"):
        check_equal(checkpoint, "llama", written(rules))


# --- what such files say that today's models have otherwise -----------------------------------------------------------


def planned(checkpoint, name, rules=None):
    """(plan of a style's rules, what it warned of)."""
    style = STYLES[name]
    config = checkpoint(style.family, **style.overrides)[0].config
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = plan(meta_model(config), rules or style.rules(), devices=CPU | {"cuda:0": "cpu:0"})
    return found, [str(warning.message) for warning in caught]


def test_the_rotary_rule_of_the_first_layers_places_the_one_that_all_share(checkpoint):
    found, told = planned(checkpoint, "DeepSeek-V3 two GPUs")
    assert found["model.rotary_emb"].rule.number == 1 and found["model.rotary_emb"].device == "cpu:0"
    assert any("rule 2: places nothing: all layers share model.rotary_emb now" in text for text in told)


def test_rules_that_never_matched_are_told_of_and_mistakes_are_still_errors(checkpoint):
    for name in ("Qwen3-30B", "Qwen3-30B sft amx"):  # the second names the family in its operators alone
        found, told = planned(checkpoint, name)
        assert found["model.rotary_emb"].rule is None
        assert any("rule 1: matches no module of Qwen3MoeForCausalLM (class" in text for text in told)
    rules = STYLES["Qwen3-30B"].rules()
    for mistake in (rule("default", r"^model\.leyers"), rule("default", "^lm_heat", "torch.nn.Linear")):
        with pytest.raises(RuleError, match="matches no module"):
            planned(checkpoint, "Qwen3-30B", [*rules, mistake])


def test_a_file_of_another_family_is_a_mistake(checkpoint):
    with pytest.raises(RuleError, match=r"class .*MixtralSparseMoeBlock matches 0"):
        planned(checkpoint, "Qwen3-30B", STYLES["Mixtral"].rules())
