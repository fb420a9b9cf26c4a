"""llama.cpp computes with our GGUF LoRA files what PEFT computes with the folder they were made of.

Runs where the llama-cpp-python package is installed (`pip install llama-cpp-python`), or where KT_LLAMA_CPP names the
Python of an environment that has it, as it shares no environment with newer numpy; is skipped elsewhere.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from ktransformers.gguf_files.lora import peft_to_gguf
from ktransformers.gguf_files.write import quantize_folder
from ktransformers.sft.merge import merge
from tests.gguf_files.test_families import model_of
from tests.gguf_files.test_lora import adapted
from tests.gguf_files.test_write import byte_tokenizer

PYTHON = os.environ.get("KT_LLAMA_CPP", sys.executable if importlib.util.find_spec("llama_cpp") else "")
pytestmark = [
    pytest.mark.skipif(not PYTHON, reason="llama-cpp-python is not installed"),
    pytest.mark.filterwarnings("ignore"),
]
pytest.importorskip("peft")

VOCABULARY = 300
PROGRAM = """
import json, sys
import numpy as np
from llama_cpp import Llama
model, lora, prompt, answer = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), sys.argv[4]
llama = Llama(model, lora_path=lora or None, n_ctx=128, logits_all=True, verbose=False, n_threads=1)
llama.eval(prompt)
json.dump(np.asarray(llama.scores[: len(prompt)]).tolist(), open(answer, "w"))
"""


def theirs(model, lora, prompt, answer):
    command = [PYTHON, "-c", PROGRAM, model, lora, json.dumps(prompt), answer]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.tensor(json.loads(answer.read_text()))


# Mixtral's rows of q and k move. The releases seen up to 0.3.36 compute latent attention's other projections without
# adapters, though they take them: DeepSeek's layers are adapted where an adapter counts.
TARGETS = {"deepseek_v3": {"target_modules": ["o_proj"]}}


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "deepseek_v3", "olmoe"])
@pytest.mark.parametrize("config", [{}, {"use_rslora": True, "rank_pattern": {"q_proj": 2, "experts.down_proj": 3}}],
                         ids=["plain", "patterns"])  # fmt: skip
def test_same_logits(model_type, config, tmp_path):
    base = model_of(model_type, vocab_size=VOCABULARY, eos_token_id=257)
    base.save_pretrained(tmp_path / "hf")
    byte_tokenizer()[1].save(str(tmp_path / "hf" / "tokenizer.json"))
    quantize_folder(tmp_path / "hf", tmp_path / "m.gguf", "F32")
    model = adapted(base, **config, **TARGETS.get(model_type, {}))
    model.save_pretrained(tmp_path / "peft")
    lora = peft_to_gguf(tmp_path / "peft", tmp_path / "a.gguf", base.config)
    prompt = [(i * 37 + 5) % 250 for i in range(13)]
    with torch.no_grad():
        plain, expected = (one(torch.tensor([prompt])).logits[0] for one in (base, model))
    spread = float(expected.max() - expected.min())
    without, found = (theirs(tmp_path / "m.gguf", file, prompt, tmp_path / "answer") for file in ("", lora))
    assert (plain - expected).abs().max() > 0.2 * spread  # the adapter matters
    assert (without - plain).abs().max() < 0.01 * spread  # what their half-precision cache leaves
    assert (found - expected).abs().max() < 0.01 * spread
    merge(tmp_path / "m.gguf", tmp_path / "peft", tmp_path / "merged.gguf")
    assert (theirs(tmp_path / "merged.gguf", "", prompt, tmp_path / "answer") - expected).abs().max() < 0.01 * spread
