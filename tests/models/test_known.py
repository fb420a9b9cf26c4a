"""Known models: what their configs build has as many parameters as the publishers say, in all and for one token."""

import json
import subprocess
import sys
from importlib import resources

import pytest
from ktransformers.models import DEFAULT_RULES
from ktransformers.models.known import KNOWN, find_known, known_config, known_names
from transformers import AutoConfig

from ktransformers.configs import meta_model
from ktransformers.errors import KTransformersError
from ktransformers.rules.plan import packaged_rules

EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts")

VOCABULARY = {
    "glm-4.5": 0,  # its report: embeddings and output layer are not counted
    "glm-4.5-air": 0,
    "kimi-k2": 2,
    "kimi-k2-thinking": 2,
    "llama-4-maverick": 2,
    "llama-4-scout": 2,
    "mixtral-8x7b": 2,
    "kimi-k2-0905": 2,
    "kimi-k2.5": 2,
    "moonlight-16b-a3b": 2,
    "qwen3-30b-a3b": 2,
    "qwen3-coder-30b-a3b": 2,
    "qwen3-coder-next": 0,
    "qwen3-next-80b-a3b": 0,
}
"""Matrices of the size of the vocabulary that a publisher counts as active: by default 1, the output layer, which is
what one token computes with (of the embedding it reads one row)."""

ROUNDED = {"qwen3-next-80b-a3b": 0.09, "qwen3-coder-next": 0.09}
"""Where the published number of active parameters is too round for 5 %: 3.25e9 is called A3B."""


@pytest.fixture(scope="module", params=KNOWN)
def built(request):
    """(known model, its config, its meta model)"""
    config = known_config(request.param)
    return KNOWN[request.param], config, meta_model(config)


def counts(config, model):
    """(all parameters, of them in routed experts, in one matrix of the vocabulary's size)"""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    routed = sum(size for name, size in sizes.items() if ".experts." in name)
    return sum(sizes.values()), routed, config.vocab_size * config.hidden_size


def test_total_parameters_are_those_published(built):
    known, config, model = built
    total, _, _ = counts(config, model)
    assert total == pytest.approx(known.parameters, rel=0.015), f"{known.name}: {total:,}"


def test_active_parameters_are_those_published(built):
    known, config, model = built
    total, routed, vocabulary = counts(config, model)
    experts = next(getattr(config, name) for name in EXPERTS if getattr(config, name, None))
    active = total - routed + routed * config.num_experts_per_tok // experts
    active -= (2 - VOCABULARY.get(known.name, 1)) * vocabulary
    assert active == pytest.approx(known.active, rel=ROUNDED.get(known.name, 0.05)), f"{known.name}: {active:,}"


def test_the_model_is_no_memory_and_of_the_published_type(built):
    _, config, model = built
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    assert type(model).__name__ in (config.architectures[0], "KimiK2ForCausalLM")
    assert str(model.lm_head.weight.dtype) == "torch.bfloat16"


def test_the_default_rule_is_packaged(built):
    _, config, _ = built
    assert DEFAULT_RULES[config.model_type] in packaged_rules()


@pytest.mark.parametrize("name", KNOWN)
def test_the_config_is_what_autoconfig_reads_from_the_same_file(name, tmp_path):
    text = resources.files("ktransformers.models").joinpath("configs", KNOWN[name].file).read_text("utf-8")
    (tmp_path / "config.json").write_text(text)
    read = AutoConfig.from_pretrained(tmp_path, local_files_only=True, trust_remote_code=False)
    assert {**known_config(name).to_dict(), "_name_or_path": str(tmp_path)} == read.to_dict()
    for field, value in json.loads(text).items():
        if field not in ("rope_theta", "rope_scaling", "rope_parameters", "torch_dtype", "dtype", "partial_rotary_factor"):
            # transformers turns what it does not use, such as the interval, into other fields
            found = getattr(read, field, value)
            assert (value.items() <= found.items() if isinstance(value, dict) else found == value), field


def test_every_known_config_is_built_in_a_process_that_has_loaded_nothing_else():
    code = "from ktransformers.models.known import KNOWN, known_config; print([known_config(n).model_type for n in KNOWN])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0 and ran.stdout.count("kimi_k2") == 4, ran.stderr[-2000:]


ROPE = {
    "deepseek-v3": {"rope_theta": 10000, "rope_type": "yarn", "factor": 40, "mscale_all_dim": 1.0},
    "deepseek-v2": {"rope_theta": 10000, "rope_type": "yarn", "factor": 40, "mscale_all_dim": 0.707},
    "kimi-k2-0905": {"rope_theta": 50000.0, "rope_type": "yarn", "factor": 64.0},
    "moonlight-16b-a3b": {"rope_theta": 50000.0, "rope_type": "default"},
    "qwen3-coder-480b-a35b": {"rope_theta": 10000000, "rope_type": "default"},
    "deepseek-v2-lite": {"rope_theta": 10000, "rope_type": "yarn", "factor": 40, "mscale_all_dim": 0.707},
    "kimi-k2": {"rope_theta": 50000.0, "rope_type": "yarn", "factor": 32.0, "beta_fast": 1.0},
    "qwen3-30b-a3b": {"rope_theta": 1000000.0, "rope_type": "default"},
    "qwen3-next-80b-a3b": {"rope_theta": 10000000, "partial_rotary_factor": 0.25},
    "glm-4.5": {"rope_theta": 1000000, "partial_rotary_factor": 0.5},
    "glm-5": {"rope_theta": 1000000, "rope_type": "default"},
    "minimax-m2": {"rope_theta": 5000000, "partial_rotary_factor": 0.5},
    "gpt-oss-120b": {"rope_theta": 150000, "rope_type": "yarn", "factor": 32.0, "truncate": False},
    "llama-4-scout": {"rope_theta": 500000.0, "rope_type": "llama3", "factor": 16.0},
    "llama-4-maverick": {"rope_theta": 500000.0, "rope_type": "default"},
}


@pytest.mark.parametrize("name", ROPE)
def test_rope_arrives_where_transformers_reads_it(name):
    assert ROPE[name].items() <= known_config(name).rope_parameters.items()


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("deepseek-v3", "fp8"),
        ("deepseek-r1", "fp8"),
        ("deepseek-v3.2", "fp8"),
        ("kimi-k2", "fp8"),
        ("kimi-k2-thinking", "compressed-tensors"),
        ("minimax-m2", "fp8"),
        ("minimax-m2.5", "fp8"),
        ("kimi-k2-0905", "fp8"),
        ("kimi-k2.5", "compressed-tensors"),
        ("deepseek-v4-flash", "fp8"),
        ("glm-4.7", None),
        ("qwen3-coder-480b-a35b", None),
        ("gpt-oss-20b", "mxfp4"),
        ("glm-5", None),
        ("qwen3-235b-a22b", None),
    ],
)
def test_the_format_is_that_of_the_checkpoint(name, method):
    stored = getattr(known_config(name), "quantization_config", None) or {}
    assert stored.get("quant_method") == method
    assert method != "fp8" or stored["weight_block_size"] == [128, 128]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("deepseek-v3", "deepseek-v3"),
        (" DeepSeek-V3 ", "deepseek-v3"),
        ("deepseek-ai/DeepSeek-V3", "deepseek-v3"),
        ("deepseek-ai/deepseek-v3-0324", "deepseek-v3"),
        ("DeepSeek-R1-0528", "deepseek-r1"),
        ("moonshotai/Kimi-K2-Instruct", "kimi-k2"),
        ("KIMI-K2", "kimi-k2"),
        ("Qwen/Qwen3-30B-A3B", "qwen3-30b-a3b"),
        ("zai-org/GLM-4.5-Air", "glm-4.5-air"),
        ("meta-llama/Llama-4-Scout-17B-16E-Instruct", "llama-4-scout"),
        ("llama4-maverick", "llama-4-maverick"),
        ("openai/gpt-oss-120b", "gpt-oss-120b"),
        ("deepseek-v2-chat", "deepseek-v2"),
        ("moonlight", "moonlight-16b-a3b"),
        ("qwen3-coder", "qwen3-coder-480b-a35b"),
        ("qwen3.5-397b", "qwen3.5-397b-a17b"),
        ("Qwen2-57B", "qwen2-57b-a14b"),
        ("MiniMaxAI/MiniMax-M2.5", "minimax-m2.5"),
        ("zai-org/GLM-5.1", "glm-5.1"),
    ],
)
def test_names_that_users_type(typed, meant):
    assert find_known(typed).name == meant
    assert known_config(typed).name_or_path == KNOWN[meant].source


def test_no_name_means_two_models():
    names = [name for known in KNOWN.values() for name in {known.name, *known.aliases, known.source.split("/")[1].lower()}]
    assert len(names) == len(set(names)), sorted(name for name in names if names.count(name) > 1)
    assert all(name == name.lower() for name in names if name not in KNOWN) and known_names() == list(KNOWN)


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("deepsek-v3", "did you mean 'deepseek-v3'"),
        ("kimi2", "Known: deepseek-v2, deepseek-v2-lite, deepseek-v3,"),
        ("someone/Qwen3-30B-A3B", "did you mean 'qwen/qwen3-30b-a3b'"),
        ("", "Known: "),
    ],
)
def test_an_unknown_name_is_one_error_with_the_nearest(typed, hint):
    with pytest.raises(KTransformersError, match=f"no known model.*{hint}"):
        known_config(typed)


def test_every_config_file_is_of_a_known_model():
    files = {path.name for path in resources.files("ktransformers.models").joinpath("configs").iterdir()}
    assert files == {known.file for known in KNOWN.values()}
