"""An adapter on a loaded model: from a PEFT folder or a GGUF LoRA file, in chat, bench and the engine that serves."""

import copy
import importlib.util
import json
import queue

import pytest
import torch
from typer.testing import CliRunner

from ktransformers import cli, native
from ktransformers.cli import serve
from ktransformers.engine.batching import BatchingEngine
from ktransformers.engine.generate import generate
from ktransformers.engine.load import load
from ktransformers.engine.requests import Done, Request, Token
from ktransformers.engine.sampling import Sampling
from ktransformers.errors import UnsupportedError, WeightError
from ktransformers.gguf_files.lora import peft_to_gguf, write_gguf_lora
from ktransformers.gguf_files.write import quantize_folder
from ktransformers.loaders.lora import LowRank
from ktransformers.sft import adapters
from ktransformers.sft.adapters import load_adapter
from tests.sft.test_peft import EXPERTS, IDS, adapted, logits, mine
from tests.tiny import relative_error, save, tiny_model

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not native.available(), reason="C library not built"),
]
TARGETS = {
    "qwen3_moe": {"target_modules": ["q_proj", "v_proj", "o_proj"], "target_parameters": EXPERTS},
    "deepseek_v3": {"target_modules": ["q_a_proj", "o_proj"], "target_parameters": EXPERTS},
}


@pytest.fixture
def given(checkpoint, tmp_path):
    """Call with a family: (config, folder, its adapter's folder and GGUF file, transformers' model with it, the base's logits)."""

    def make(family="qwen3_moe"):
        reference, folder = checkpoint(family)
        plain = logits(copy.deepcopy(reference))
        model = adapted(copy.deepcopy(reference), **TARGETS[family])
        model.save_pretrained(tmp_path / "peft")
        lora = peft_to_gguf(tmp_path / "peft", tmp_path / "a.gguf", reference.config)
        return reference.config, folder, (tmp_path / "peft", lora), model.eval(), plain

    return make


@pytest.mark.parametrize("family", TARGETS)
def test_from_a_folder_and_from_a_gguf_file(given, family, exact):
    config, folder, paths, right, plain = given(family)
    expected = logits(right)
    for path in paths:
        model = mine(config, folder)
        loaded = load_adapter(model, path)
        assert not loaded.training and loaded.get_base_model() is model
        assert relative_error(logits(loaded), expected) < 1e-5 < 1e-3 < relative_error(plain, expected)
        assert relative_error(logits(model), expected) < 1e-5
        with loaded.disable_adapter():
            assert relative_error(logits(loaded), plain) < 1e-5


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["o_proj"], "target_parameters": ["mlp.gate.weight"]},
        {"target_modules": ["o_proj"], "modules_to_save": ["input_layernorm"]},
        {"target_modules": "all-linear"},
    ],
    ids=["embedding, head", "router", "norms", "all-linear"],
)
def test_every_place(checkpoint, family, targets, exact, tmp_path):
    reference, folder = checkpoint(family)
    model = adapted(copy.deepcopy(reference), **targets)
    for name, tensor in model.named_parameters():
        if "modules_to_save" in name:
            tensor.data.mul_(1.5)
    model.save_pretrained(tmp_path)
    expected = logits(model)
    assert relative_error(logits(load_adapter(mine(reference.config, folder), tmp_path)), expected) < 1e-5
    assert relative_error(logits(copy.deepcopy(reference)), expected) > 1e-3


def test_shared_experts_of_a_gguf_file(checkpoint, exact, tmp_path):
    """PEFT takes names such as gate_proj for parameters of routed experts, where it is not given whole names."""
    reference, folder = checkpoint("qwen2_moe")
    torch.manual_seed(3)
    changed, shared = copy.deepcopy(reference), {"gate": (48, 64), "down": (64, 48)}
    changes = {f"blk.1.ffn_{which}_shexp.weight": LowRank(torch.randn(3, shape[1]), torch.randn(shape[0], 3) / 9, 1 / 3)
               for which, shape in shared.items()}  # fmt: skip
    for (which, _), change in zip(shared.items(), changes.values(), strict=True):
        changed.model.layers[1].mlp.shared_expert.get_submodule(f"{which}_proj").weight.data += change.of(0)
    write_gguf_lora(tmp_path / "a.gguf", "qwen2moe", changes, 1.0)
    found = load_adapter(mine(reference.config, folder), tmp_path / "a.gguf")
    assert relative_error(logits(found), logits(changed)) < 1e-5 < 1e-3 < relative_error(logits(reference), logits(changed))


def test_the_model_keeps_its_places_and_gets_no_hooks(given):
    """PEFT has accelerate place a model with a device map anew, which gives forwards to its modules."""
    config, folder, (path, _), _, _ = given()
    model = mine(config, folder)
    places = model.hf_device_map
    load_adapter(model, path)
    assert model.hf_device_map is places
    assert not [name for name, module in model.named_modules() if {"_hf_hook", "forward"} & vars(module).keys()]


def test_modules_that_were_trained_whole_take_the_place_of_unquantized_ones(checkpoint, exact, tmp_path):
    reference, folder = checkpoint("qwen3_moe")
    model = adapted(copy.deepcopy(reference), target_modules=["o_proj"], modules_to_save=["lm_head"])
    model.lm_head.modules_to_save["default"].weight.data.mul_(1.5)
    model.save_pretrained(tmp_path / "a")
    assert relative_error(logits(load_adapter(mine(reference.config, folder), tmp_path / "a")), logits(model)) < 1e-5
    quantize_folder(folder, tmp_path / "q8.gguf", "Q8_0")
    with pytest.raises(UnsupportedError, match=r"lm_head: trained whole.*kt merge"):
        load_adapter(mine(reference.config, tmp_path / "q8.gguf"), tmp_path / "a")


@pytest.mark.parametrize("family", TARGETS)
def test_the_engines_compute_with_it(given, family, exact):
    """One answer at a time and many together: the greedy tokens of transformers' model with the adapter."""
    config, folder, (path, _), right, _ = given(family)
    model = load_adapter(mine(config, folder), path).get_base_model()
    prompts = [IDS[0].tolist(), IDS[1, :9].tolist(), IDS[1, 3:20].tolist()]
    expected = [greedy(right, prompt, 6) for prompt in prompts]
    assert [list(generate(model, prompt, max_new_tokens=6, chunk_size=8)) for prompt in prompts] == expected
    engine, heard = BatchingEngine(model, chunk_size=8), [queue.Queue() for _ in prompts]
    for prompt, events in zip(prompts, heard, strict=True):
        engine.submit(Request(prompt, 6), events.put)
    assert [answer(events) for events in heard] == expected
    engine.close()


@torch.no_grad()
def greedy(model, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def answer(events):
    tokens = []
    while not isinstance(event := events.get(timeout=60), Done):
        tokens += [event.id] if isinstance(event, Token) else []
    assert event.reason == "length", event
    return tokens


def test_what_does_not_fit_is_told_by_name(given, tmp_path, monkeypatch):
    config, folder, (path, lora), _, _ = given()
    model = mine(config, folder)
    with pytest.raises(WeightError, match="no such file or folder"):
        load_adapter(model, tmp_path / "none")
    with pytest.raises(WeightError, match=r"no adapter_config\.json.*Give .*peft"):
        load_adapter(model, tmp_path)
    with pytest.raises(WeightError, match="expected a PEFT folder"):
        load_adapter(model, path / "adapter_model.safetensors")
    smaller = tiny_model("qwen3_moe", num_hidden_layers=2)
    other = mine(smaller.config, save(smaller, tmp_path / "other"))
    for one in (path, lora):
        with pytest.raises(WeightError, match=r"does not fit the model(.|\n)*2\."):
            load_adapter(other, one)
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match="pip install peft"):
        load_adapter(model, path)


# --- the programs -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def for_embedded(tmp_path_factory):
    """An adapter of the embedded model that makes it say something else."""
    folder = tmp_path_factory.mktemp("embedded") / "peft"
    model, _ = load()
    torch.manual_seed(1)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["o_proj"], target_parameters=EXPERTS))
    for name, tensor in model.named_parameters():
        if "lora_B" in name:
            tensor.data.normal_(0, 1.0)
    model.save_pretrained(folder)
    return folder


def run(*arguments, **more):
    return CliRunner().invoke(cli.app, [str(one) for one in arguments], **more)


def test_chat_answers_with_it(for_embedded, tmp_path):
    (tmp_path / "prompt.txt").write_text("What is a rule file?")
    words = ["chat", "--prompt-file", tmp_path / "prompt.txt", "--greedy", "--json", "--max-new-tokens", "12"]
    plain, found = run(*words), run(*words, "--adapter", for_embedded)
    assert plain.exit_code == found.exit_code == 0, found.output
    model, tokenizer = load()
    right = load_adapter(model, for_embedded)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "What is a rule file?"}], add_generation_prompt=True,
                                        return_tensors="pt", return_dict=True).input_ids  # fmt: skip
    made = right.generate(input_ids=ids, do_sample=False, max_new_tokens=12)[0, ids.shape[1]:]
    said = json.loads(found.stdout)["answer"]
    assert said == tokenizer.decode(made, skip_special_tokens=True)
    assert said != json.loads(plain.stdout)["answer"]


def test_programs_refuse_a_path_that_is_none_before_loading(tmp_path):
    for program in ("chat", "bench", "serve"):
        ran = run(program, "--adapter", tmp_path / "none")
        assert ran.exit_code == 1 and "no such file or folder" in ran.stderr, ran.output


@pytest.mark.skipif(not all(map(importlib.util.find_spec, serve.EXTRA)), reason="the extra `serve` is not installed")
def test_serve_computes_with_it_and_keeps_its_prefixes_apart(for_embedded):
    plain, served = (serve.open_model(serve.ServeOptions(adapter=given, as_json=True)) for given in ([], [str(for_embedded)]))
    ids = served.tokenizer("What is a rule file?").input_ids
    found = []
    for one in (plain, served):
        events = queue.Queue()
        one.engine.submit(Request(ids, 6), events.put)
        found.append(answer(events))
        one.engine.close()
    model, _ = load()
    right = load_adapter(model, for_embedded).get_base_model()
    assert found[1] == list(generate(right, ids, max_new_tokens=6, sampling=Sampling())) != found[0]
    assert served.facts["adapter"] == "peft" and plain.facts["adapter"] is None


def test_bench_measures_with_it(for_embedded):
    ran = run("bench", "--adapter", for_embedded, "-p", "16", "-n", "2", "--repetitions", "1", "--json")
    assert ran.exit_code == 0 and json.loads(ran.stdout)["speeds"], ran.output
