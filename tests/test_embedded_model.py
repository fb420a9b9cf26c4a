"""The model that ships is small and answers nine of ten questions it was never trained on, from both of its files."""

import sys

import pytest
import torch
from ktransformers.models import embedded_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import ktransformers

FOLDER = embedded_model()
sys.path.insert(0, str(FOLDER.parent / "training"))

from corpus import heldout_keys, normalise, read_concepts, read_heldout  # noqa: E402
from evaluate import score  # noqa: E402


def from_safetensors():
    return AutoModelForCausalLM.from_pretrained(FOLDER)


def from_gguf():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(FOLDER))
    (gguf,) = FOLDER.glob("*.gguf")
    return ktransformers.optimize_and_load(model, "DeepSeek-V3", gguf, devices={"cuda": "cpu"}, progress=False)


def test_it_is_small_enough_to_ship():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 16e6


def test_it_is_a_deepseek_v3_style_moe():
    config = AutoConfig.from_pretrained(FOLDER)
    assert config.model_type == "deepseek_v3" and config.first_k_dense_replace == 1 and config.n_shared_experts >= 1
    assert config.n_routed_experts >= 8 and config.num_experts_per_tok == 2 and config.kv_lora_rank > 0
    bias = from_safetensors().model.layers[-1].mlp.gate.e_score_correction_bias
    assert bias.dtype == torch.float32 and bias.abs().sum() > 0, "the correction bias was trained"


def test_the_questions_were_not_trained_on():
    assert len(heldout_keys(read_concepts())) > 200  # raises ValueError if one stands in the training text
    questions = [normalise(question) for _, question in read_heldout()]
    assert len(questions) == len(set(questions))


@pytest.mark.parametrize("load", [from_safetensors, from_gguf])
def test_it_answers_nine_of_ten(load):
    results = score(load(), AutoTokenizer.from_pretrained(FOLDER))
    wrong = [f"{result.question} -> {result.answer[:60]}" for result in results if not result.right]
    assert len(wrong) <= 0.1 * len(results), "\n".join(wrong)
