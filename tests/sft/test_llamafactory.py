"""LLaMA-Factory's own trainers on our operators, by the training files that are printed: `make test-llamafactory`.

Everything of a printed file is as printed but the model, the datasets' folder, the output and how often it logs.
"""

import copy
import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from ktransformers.models import embedded_model
from safetensors.torch import load_file

from ktransformers import native
from ktransformers.errors import UnsupportedError
from ktransformers.gguf_files.write import quantize_folder
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
                lines = [line for line in state.log_history if "loss" in line]
                self.model, self.losses = model, [line["loss"] for line in lines]
                self.warms_up = lines[0]["learning_rate"] == 0 < args.warmup_steps < 1

        keep, threads = Keep(), native.threads()
        try:
            run_exp(settings(name, models, data, tmp_path / "out", **changes), [keep])
        finally:
            native.set_threads(threads)
        assert keep.warms_up  # all printed files say warmup_ratio
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


@pytest.mark.parametrize("name", [SFT, DPO])
def test_losses_are_those_on_transformers_own_model(run, name):
    changes = {"lora_target": "q_a_proj,o_proj", "learning_rate": 0.01, "bf16": False}
    model, found, _ = run(name, **changes)
    assert_ours(model)
    model, expected, _ = run(name, use_kt=False, **changes)
    assert not any(isinstance(m, KTransformersExperts) for m in model.modules())
    assert found == pytest.approx(expected, rel=1e-4) and min(found) < 0.9 * found[0]


@pytest.mark.parametrize("loss", ["orpo", "simpo"])
def test_other_losses_of_preferences(run, loss):
    model, losses, out = run(DPO, pref_loss=loss, max_steps=2)
    assert_ours(model)
    assert len(losses) == 2 and parts(load_file(out / "adapter_model.safetensors"))[1] == EXPERTS


def test_answers_with_the_adapter(run, models, prepared):
    from llamafactory.chat import ChatModel

    _, _, out = run(DPO, max_steps=1)
    printed = yaml.safe_load((PRINTED / "deepseek2_lora_chat_kt.yaml").read_text())
    here = {"model_name_or_path": str(models(FAMILY[DPO])[1]), "adapter_name_or_path": str(out), "max_new_tokens": 8}
    chat = ChatModel({**printed, **here})
    assert_ours(chat.engine.model)
    (answer,) = chat.chat([{"role": "user", "content": "Who are you?"}])
    assert 0 < answer.response_length <= 8


def test_code_of_a_model_folder_is_not_run(run, models, tmp_path):
    folder = shutil.copytree(models("deepseek_v2")[1], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "here.Config", "AutoModelForCausalLM": "here.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "here.py").write_text("raise SystemExit('the code of the folder ran')")
    model, _, _ = run(SFT, model_name_or_path=str(folder), max_steps=1)
    assert_ours(model)
    assert model.get_base_model()._auto_class is None  # or it would be saved with each model of its class


def test_packed_weights_of_another_file(run, models, tmp_path):
    quantize_folder(models("deepseek_v3")[1], tmp_path / "model.gguf", "Q8_0")
    model, losses, _ = run(SFT, kt_weight_path=str(tmp_path / "model.gguf"), learning_rate=0.01)
    assert_ours(model)
    experts = next(m for m in model.modules() if isinstance(m, KTransformersExperts))
    assert {weight.type.name for matrix in experts.active.experts.matrices for weight in matrix} == {"Q8_0"}
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    "change", [{"finetuning_type": "full"}, {"use_dora": True}, {"resize_vocab": True}, {"add_tokens": "a,b"}], ids=str
)
def test_what_packed_weights_cannot_do_is_refused_before_they_load(run, change):
    key = "resize_vocab" if "add_tokens" in change else next(iter(change))
    with pytest.raises(UnsupportedError, match=f"{key}: the weights stay packed .*use_kt: false"):
        run(SFT, **change)


def test_export_merges_into_transformers_own_model_alone(run, models, tmp_path):
    from llamafactory.train.tuner import export_model

    _, _, out = run(DPO, max_steps=1)
    asked = {"model_name_or_path": str(models("deepseek_v2")[1]), "adapter_name_or_path": str(out), "template": "llama3",
             "export_dir": str(tmp_path / "merged")}  # fmt: skip
    with pytest.raises(UnsupportedError, match="export_dir: the weights stay packed"):
        export_model(asked)
    export_model({**asked, "use_kt": False})
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_flags_have_the_defaults_of_files(prepared, models):
    from llamafactory.hparams import get_infer_args

    given = ["--model_name_or_path", str(models("deepseek_v2")[1])]
    assert get_infer_args(given)[0].use_kt and not get_infer_args([*given, "--use_kt", "false"])[0].use_kt


def test_what_a_file_says_in_vain_is_said(run, monkeypatch):
    said = []
    monkeypatch.setattr(launcher, "_say", said.append)
    run(SFT, max_steps=1, mode="normal")
    for text in ("chunk_size changes nothing here", "mode changes nothing here", "trust_remote_code changes nothing here: code",
                 "amx-multi-gpu.yaml is not here", "no adapter on mlp.down_proj"):  # fmt: skip
        assert any(text in line for line in said), (text, said)


def test_its_command_trains(prepared, models, data, tmp_path):
    file = tmp_path / "train.yaml"
    file.write_text(yaml.safe_dump(settings(SFT, models, data, tmp_path / "out", max_steps=1)))
    script = Path(sys.executable).with_name("llamafactory-cli")
    ours = script.exists() and "ktransformers" in script.read_text()  # where `make setup-llamafactory` made it
    command = [script] if ours else [sys.executable, "-m", launcher.__name__]
    done = subprocess.run([*command, "train", file], capture_output=True, text=True, env={**os.environ, "USE_KT": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert parts(load_file(tmp_path / "out" / "adapter_model.safetensors"))[1] == EXPERTS


def test_a_fault_is_a_sentence(prepared, models, data, tmp_path):
    settled = settings(SFT, models, data, tmp_path / "out", kt_optimize_rule="my.yaml")
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(settled))
    command = [sys.executable, "-m", launcher.__name__, "train", tmp_path / "train.yaml"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: kt_optimize_rule: my.yaml: no such file")


def test_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(launcher, "version", lambda name: "0.9.4")
    with pytest.raises(UnsupportedError, match=r"found 0\.9\.4, expected 0\.9\.5.*make setup-llamafactory"):
        launcher.prepare()
