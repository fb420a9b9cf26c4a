"""LLaMA-Factory's own trainers on our operators, by the training files that are printed: `make test-llamafactory`.

Everything of a printed file is as printed but the model, the datasets' folder, the output and how often it logs.
"""

import copy
import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ktransformers import native
from ktransformers.errors import UnsupportedError
from ktransformers.models import embedded_model
from ktransformers.operators.experts import KExpertsCPU, KTransformersExperts
from ktransformers.operators.linear import KLinearCPUInfer, KTransformersLinear
from ktransformers.sft import llamafactory as launcher
from tests.tiny import random_ids, relative_error, save, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")
PRINTED = Path(__file__).parent / "published"
SFT, DPO = "deepseek3_lora_sft_kt", "deepseek2_lora_dpo_kt"
FAMILY = {SFT: "deepseek_v3", DPO: "deepseek_v2"}
ROWS = 1600
"""Of the embedding: like published models more than the tokenizer has, for a template may add tokens."""
LINEARS = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
EXPERTS = {"experts.lora_A", "experts.lora_B", "experts.base_layer.lora_A", "experts.base_layer.lora_B"}


@pytest.fixture(scope="module")
def prepared():
    if find_spec("llamafactory") is None:
        pytest.skip("llamafactory is not installed: make test-llamafactory")
    launcher.prepare()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Call with a family: (transformers' tiny model, its folder with the embedded model's tokenizer)."""
    made = {}

    def make(family):
        if family not in made:
            config = json.loads((embedded_model() / "config.json").read_text())
            ids = {name: config.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
            model = tiny_model(family, vocab_size=ROWS, **ids)
            folder = save(model, tmp_path_factory.mktemp(family))
            for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
                shutil.copy(embedded_model() / name, folder)
            made[family] = model, folder
        return made[family]

    return make


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    asked = [{"instruction": f"Who are you, {n}?", "input": ""} for n in range(16)]
    answers = [{**row, "output": f"I am number {n}."} for n, row in enumerate(asked)]
    pairs = [{**row, "chosen": f"I am number {n}.", "rejected": "I do not know."} for n, row in enumerate(asked)]
    (folder / "answers.json").write_text(json.dumps(answers))
    (folder / "pairs.json").write_text(json.dumps(pairs))
    columns = {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}
    info = {"identity": {"file_name": "answers.json"},
            "dpo_en_demo": {"file_name": "pairs.json", "ranking": True, "columns": columns}}  # fmt: skip
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


@pytest.fixture
def run(prepared, models, data, tmp_path, exact):
    """Call with a printed file and changes: (model that was trained, losses, folder of the adapter)."""

    def train(name, **changes):
        from llamafactory.train.tuner import run_exp
        from transformers import TrainerCallback

        class Keep(TrainerCallback):
            def on_train_end(self, args, state, control, model=None, **kwargs):
                self.model, self.losses = model, [line["loss"] for line in state.log_history if "loss" in line]

        keep, threads = Keep(), native.threads()
        try:
            run_exp(settings(name, models, data, tmp_path / "out", **changes), [keep])
        finally:
            native.set_threads(threads)
        return keep.model, keep.losses, tmp_path / "out"

    return train


def settings(name, models, data, out, **changes):
    printed = yaml.safe_load((PRINTED / f"{name}.yaml").read_text())
    family = changes.pop("family", FAMILY[name])
    here = {"model_name_or_path": str(models(family)[1]), "dataset_dir": str(data), "output_dir": str(out), "logging_steps": 1}
    return {**printed, **here, **changes}


def parts(names):
    """"…layers.0.self_attn.q_a_proj.lora_A.weight" -> "q_a_proj"; of experts what is PEFT's too."""
    names = {name.removesuffix(".weight").split(".layers.")[1] for name in names}
    found = {name.split("mlp.")[1] if ".experts." in f".{name}" else name.split(".")[-2] for name in names}
    return {name for name in found if "lora" not in name}, {name for name in found if "lora" in name}


def assert_ours(model):
    experts = [m for m in model.modules() if isinstance(m, KTransformersExperts)]
    assert len(experts) == 2 and all(isinstance(m.active, KExpertsCPU) for m in experts)
    assert any(isinstance(m, KTransformersLinear) and isinstance(m.active, KLinearCPUInfer) for m in model.modules())


@pytest.mark.parametrize("name", [SFT, DPO])
def test_a_printed_file_trains_linears_and_experts(run, models, name):
    model, losses, out = run(name)
    assert_ours(model)
    assert len(losses) == 6 and all(0 < loss < 20 for loss in losses)
    saved = load_file(out / "adapter_model.safetensors")
    linears, experts = parts(saved)
    assert linears >= LINEARS & linears and {"q_a_proj", "o_proj"} <= linears and experts == EXPERTS
    for key, tensor in saved.items():
        assert tensor.isfinite().all(), key
        if "lora_B" in key:  # zero where nothing reached it
            assert tensor.any(), key


@pytest.mark.parametrize("name", [SFT, DPO])
def test_the_adapter_loads_in_stock_peft(run, models, name):
    from accelerate.utils import extract_model_from_parallel
    from peft import PeftModel

    model, _, out = run(name, learning_rate=0.01)
    model = extract_model_from_parallel(model, keep_fp32_wrapper=False)  # without the autocast to bf16 of the training
    reference = copy.deepcopy(models(FAMILY[name])[0])
    ids = random_ids(2, 24)
    with torch.no_grad():
        plain = reference(input_ids=ids).logits
        expected = PeftModel.from_pretrained(reference, out).eval()(input_ids=ids).logits
        found = model.eval()(input_ids=ids, use_cache=False).logits
    assert relative_error(found, expected) < 1e-4 and relative_error(expected, plain) > 1e-3
