"""llama.cpp computes from our GGUF files what transformers computes from the model they were made of.

Runs where the xllamacpp package is installed (`pip install xllamacpp`, llama.cpp as a wheel), and is skipped
elsewhere. It is the only test that sees metadata, layouts and RoPE order with eyes that are not ours.
"""

import json
import subprocess
import sys

import pytest
import torch

from ktransformers.gguf_files.write import quantize_folder
from tests.gguf_files.test_families import CONFIGS, model_of
from tests.gguf_files.test_write import byte_tokenizer
from tests.loaders import small_files

pytest.importorskip("xllamacpp")

VOCABULARY = 300
YARN = dict(
    rope_type="yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=32, beta_slow=1,
    rope_theta=10000.0, mscale=1.0, mscale_all_dim=1.0,
)  # fmt: skip
# llama.cpp knows the deepseek2 without q_a_proj by its 27 layers alone, and has no dense qwen layers.
MODELS = {
    "deepseek_v2": dict(num_hidden_layers=27),
    "deepseek_v2 with q_lora and yarn": dict(q_lora_rank=48, rope_parameters=YARN),
    "deepseek_v3": dict(n_routed_experts=8),
    "deepseek_v3 with yarn": dict(rope_parameters=YARN),
    "qwen2_moe": dict(mlp_only_layers=[]),
    "qwen3_moe": dict(norm_topk_prob=True),
    "mixtral": {},
}

# One token's log-probabilities over the whole vocabulary; the library prints, so the answer goes to a file.
PROGRAM = """
import json, sys, xllamacpp
path, prompt, answer = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.warmup = path, 128, False
request = dict(prompt=prompt, n_predict=1, n_probs=300, temperature=0, cache_prompt=False)
reply = xllamacpp.Server(params).handle_completions(request)
reply = json.loads(reply) if isinstance(reply, (str, bytes)) else reply
where = reply.get("completion_probabilities") or reply["choices"][0]["logprobs"]["content"]
found = where[0]["top_logprobs"]
json.dump({token["id"]: token["logprob"] for token in found}, open(answer, "w"))
"""


def readable_prompt(model) -> tuple[list[int], torch.Tensor]:
    """A prompt after which the likeliest token is printable (llama.cpp is silent about half a character), and
    the log-probabilities after it."""
    alphabet = byte_tokenizer()[0]
    for start in range(100):
        prompt = [(i * 37 + start * 11) % 250 for i in range(13)]
        logits = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        best = int(logits.argmax())
        if best < len(alphabet) and alphabet[best].isascii():
            return prompt, logits
    raise AssertionError("no such prompt")


@pytest.mark.parametrize("case", MODELS)
def test_same_probabilities(case, tmp_path):
    """Every token's log-probability agrees to what llama.cpp's half-precision cache leaves."""
    family = case.split()[0]
    changes = dict(vocab_size=VOCABULARY, num_hidden_layers=3, eos_token_id=257) | MODELS[case]
    model = small_files.model(family, **changes).eval()
    for name, tensor in model.named_parameters():
        if "norm" in name:
            tensor.data.add_(1)
    agree(model, tmp_path)


# PhiMoE's router is not what llama.cpp computes.
OTHERS = sorted(set(CONFIGS) - {case.split()[0] for case in MODELS} - {"phimoe"})


@pytest.mark.parametrize("model_type", OTHERS)
def test_same_probabilities_in_other_families(model_type, tmp_path):
    """The same for each other family of gguf_names.py: the layouts and the metadata are llama.cpp's."""
    agree(model_of(model_type, vocab_size=VOCABULARY, eos_token_id=257), tmp_path)


@torch.no_grad()
def agree(model, tmp_path):
    model.save_pretrained(tmp_path / "hf")
    byte_tokenizer()[1].save(str(tmp_path / "hf" / "tokenizer.json"))
    quantize_folder(tmp_path / "hf", tmp_path / "m.gguf", "F32")
    prompt, ours = readable_prompt(model)
    command = [sys.executable, "-c", PROGRAM, tmp_path / "m.gguf", json.dumps(prompt), tmp_path / "answer"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = json.loads((tmp_path / "answer").read_text())
    assert len(theirs) == VOCABULARY
    worst = max(abs(ours[int(token)].item() - value) for token, value in theirs.items())
    assert worst < 0.03 * float(ours.max() - ours.min()), worst
