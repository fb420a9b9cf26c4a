"""`kt sft`: training files, datasets, and runs on tiny models and the embedded one."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from ktransformers.models import embedded_model
from safetensors.torch import load_file
from transformers import AutoTokenizer

from ktransformers.errors import SFTError
from ktransformers.sft import data, encode
from ktransformers.sft.options import Options
from ktransformers.sft.read import made_of, read
from ktransformers.sft.rules import rule_of
from tests.tiny import save, tiny_model

pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")
PUBLISHED = Path(__file__).parent / "published"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded_model())


@pytest.fixture
def folder(tmp_path):
    """A dataset folder: cat (alpaca) and pairs (sharegpt), 12 examples each."""
    cat = [{"instruction": f"What is {i} plus 1?", "input": "", "output": f"Meow, {i + 1}."} for i in range(12)]
    pairs = [{"conversations": [{"from": "human", "value": row["instruction"]}], "chosen": {"from": "gpt", "value": row["output"]},
              "rejected": {"from": "gpt", "value": "No."}} for row in cat]  # fmt: skip
    (tmp_path / "cat.json").write_text(json.dumps(cat))
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    info = {"cat": {"file_name": "cat.json"}, "dpo_en_demo": {"file_name": "pairs.jsonl", "formatting": "sharegpt", "ranking": True},
            "far": {"hf_hub_url": "x/y"}}  # fmt: skip
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    return tmp_path


@pytest.fixture
def options(folder):
    """Call with keys: options of a short run on the embedded model."""

    def make(**keys):
        given = {"do_train": True, "dataset": "cat", "dataset_dir": str(folder), "output_dir": str(folder / "out"), "lora_rank": 4,
                 "max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 2e-3, "logging_steps": 1, "cutoff_len": 128}  # fmt: skip
        return made_of({**given, **keys})

    return make


# ---- training files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted(PUBLISHED.glob("*.yaml")), ids=lambda p: p.stem)
def test_published_files_are_understood(file):
    found = read(str(file))
    assert found.use_kt and found.chunk_size == 8192 and (found.stage == "dpo" or "dpo" not in file.name)
    if found.do_train:
        assert found.lora_target == "all" and found.passed["gradient_accumulation_steps"] == 8 and found.passed["bf16"] is True
        assert isinstance(found.passed["learning_rate"], float) and found.alpha == 2 * found.lora_rank


def test_no_is_a_word_where_yaml_reads_false(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("save_strategy: no\neval_strategy: no\nbf16: no\nlearning_rate: 1e-4\n")
    assert read(str(file)).passed == {"save_strategy": "no", "eval_strategy": "no", "bf16": False, "learning_rate": 1e-4}


@pytest.mark.parametrize("value", [0, -1, 1.5, "many", True])
def test_sizes_of_a_step_are_whole_numbers(value):
    with pytest.raises(SFTError, match="per_device_train_batch_size: found .*, expected a whole number"):
        made_of({"per_device_train_batch_size": value})


def test_every_mistake_is_listed_with_what_was_meant(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("stage: rl\nlora_rnk: 4\nlora_rank: many\ncutoff_len: 0\ndo_train: true\nuse_dora: true\n")
    with pytest.raises(SFTError) as error:
        read(str(file))
    text = str(error.value)
    assert "did you mean 'lora_rank'" in text and "stage: found 'rl', expected one of sft, dpo" in text
    assert "lora_rank: found 'many', expected int, such as 8" in text and "use_dora" in text and "dataset: missing" in text
    assert len(error.value.problems) == 7


@pytest.mark.parametrize(("text", "message"), [("[1, 2]", "found list"), ("a: [", "is no YAML"), ("\x00", "is no YAML")])
def test_what_is_no_training_file_is_said(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(SFTError, match=message):
        read(str(tmp_path / "a.yaml"))
    with pytest.raises(SFTError, match="no such file"):
        read(str(tmp_path / "b.yaml"))


def test_keys_can_be_changed_and_kt_config_is_flat(tmp_path):
    (tmp_path / "a.yaml").write_text("lora_rank: 4\nkt_config: {weight_path: w.gguf, kt_num_threads: 2}\n")
    with pytest.raises(SFTError, match="kt_num_threads: unknown key"):
        read(str(tmp_path / "a.yaml"))
    (tmp_path / "a.yaml").write_text("lora_rank: 4\nkt_config: {weight_path: w.gguf, tp_enabled: true}\n")
    found = read(str(tmp_path / "a.yaml"), ["lora_rank=16", "learning_rate=1e-4"])
    assert found.lora_rank == 16 and found.kt_weight_path == "w.gguf" and found.passed["learning_rate"] == 1e-4
    assert any("kt_tp_enabled" in text for text in found.notices)
    with pytest.raises(SFTError, match="found no ="):
        read(str(tmp_path / "a.yaml"), ["lora_rank"])


def test_rules_are_found_or_replaced_or_refused(tmp_path):
    said = []
    (tmp_path / "mine.yaml").write_text("[]")
    assert rule_of(str(tmp_path / "mine.yaml"), said.append) == str(tmp_path / "mine.yaml") and rule_of("Qwen3-MoE", said.append) == "Qwen3-MoE"
    assert not said and rule_of("examples/kt_optimize_rules/DeepSeek-V3-Chat-sft-amx.yaml", said.append) == "" and len(said) == 1
    with pytest.raises(SFTError, match="no such file"):
        rule_of("mine.yaml", said.append)


# ---- data -----------------------------------------------------------------------------------------------------


def said(example):
    return [(m["role"], m["content"]) for m in example.messages]


def test_both_forms_and_pairs_are_read(folder):
    (cat, *_), (pair, *_) = data.read_examples("cat", str(folder)), data.read_examples("dpo_en_demo", str(folder), pairs=True)
    assert said(cat) == [("user", "What is 0 plus 1?"), ("assistant", "Meow, 1.")]
    assert said(pair) == said(cat) and pair.rejected == "No."
    assert len(data.read_examples(f"cat,{folder / 'cat.json'}", str(folder), limit=3)) == 6
    rows = [{"instruction": "a", "input": "b", "output": "c", "history": [["x", "y"]], "system": "s"},
            {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]},
            {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "f"}, {"from": "observation", "value": "o"}, {"from": "gpt", "value": "r"}], "tools": "[]"}]  # fmt: skip
    (folder / "mixed.json").write_text(json.dumps(rows))
    first, second, third = data.read_examples("mixed.json", str(folder), system="d")
    assert said(first) == [("system", "s"), ("user", "x"), ("assistant", "y"), ("user", "a\nb"), ("assistant", "c")]
    assert said(second)[0] == ("system", "s") and [role for role, _ in said(third)] == ["system", "user", "assistant", "tool", "assistant"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("cta", "did you mean 'cat'"), ("far", "nothing is fetched"), ("dpo_en_demo", "a pair of answers"), ("none.json", "not in"),
     ("bad.json", "line 1: is no JSON"), ("odd.json", "example 2: KeyError"), ("empty.json", "no examples"), ("number.json", "found int 3")],
)  # fmt: skip
def test_datasets_that_cannot_be_used_say_why(folder, name, message):
    (folder / "bad.json").write_text('{"instruction": ')
    (folder / "odd.json").write_text(json.dumps([{"instruction": "a", "output": "b"}, {"question": "a"}]))
    (folder / "number.json").write_text(json.dumps([{"instruction": "a", "output": 3}]))
    (folder / "empty.json").write_text("[]")
    with pytest.raises(SFTError, match=message):
        data.read_examples(name, str(folder))


def test_only_answers_are_learnt(tokenizer):
    turns = [("user", "Hi"), ("assistant", "Hello."), ("user", "Who?"), ("assistant", "Me.")]
    example = data.Example([{"role": role, "content": content} for role, content in turns])
    ids, labels = encode.encode(example, tokenizer)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(example.messages, tokenize=False)
    learnt = tokenizer.decode([label for label in labels if label != encode.IGNORED])
    assert learnt.count("Hello.") == learnt.count("Me.") == 1 and "Hi" not in learnt and "Who" not in learnt
    _, last = encode.encode(example, tokenizer, last_only=True)
    assert "Hello" not in tokenizer.decode([label for label in last if label != encode.IGNORED])
    _, all_ = encode.encode(example, tokenizer, on_prompt=True)
    assert encode.IGNORED not in all_
    rows, counts = encode.encode_all([example], tokenizer, cutoff=3)
    assert not rows and counts.dropped == counts.cut == 1


# ---- runs -----------------------------------------------------------------------------------------------------


def losses(folder, name="out"):
    lines = [json.loads(line) for line in (folder / name / "trainer_log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_a_run_learns_and_writes_everything(folder, options):
    from ktransformers.sft.train import train

    told = []
    done = train(options(plot_loss=True, val_size=2, max_steps=10, lora_dropout=0.01), told.append)
    found = losses(folder)
    assert done.steps == 10 and len(found) == 10 and found[-1] < 0.7 * found[0] and done.eval_loss < found[0]
    assert done.trained_in_experts > 0 and done.tokens > 0 and not done.stopped
    names = {"adapter_config.json", "adapter_model.safetensors", "trainer_log.jsonl", "training_loss.png", "train_results.json"}
    assert names <= set(done.files)
    assert any(".experts." in name for name in load_file(folder / "out" / "adapter_model.safetensors"))
    assert json.loads((folder / "out" / "adapter_config.json").read_text())["lora_dropout"] == 0  # as PEFT loads it
    with pytest.raises(SFTError, match="holds an adapter"):
        train(options())


def test_rows_of_several_examples_are_learnt(folder, options):
    """With `packing`: some batches are one example alone, for which transformers makes no mask."""
    from ktransformers.sft.train import train

    train(options(packing=True), lambda text: None)
    found = losses(folder)
    assert len(found) == 6 and found[-1] < 0.8 * found[0]


@pytest.mark.parametrize("loss", ["sigmoid", "orpo", "simpo"])
def test_pairs_are_learnt_by_every_loss(folder, options, loss):
    from ktransformers.sft.train import train

    train(options(stage="dpo", dataset="dpo_en_demo", pref_loss=loss, pref_beta=0.1), lambda text: None)
    found = losses(folder)
    assert len(found) == 6 and sum(found[-2:]) < sum(found[:2])


def test_a_run_that_is_continued_ends_where_one_without_a_break_does(folder, options):
    from ktransformers.sft.train import train

    how = {"save_steps": 3, "overwrite_output_dir": True}
    train(options(**how, output_dir=str(folder / "whole")))
    train(options(**how, resume_from_checkpoint=str(folder / "whole" / "checkpoint-3"), output_dir=str(folder / "again")))
    whole, again = (load_file(folder / name / "adapter_model.safetensors") for name in ("whole", "again"))
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
    with pytest.raises(SFTError, match="resume_from_checkpoint"):
        train(options(**how, resume_from_checkpoint=str(folder / "nowhere")))


def test_a_stop_saves_what_was_learnt(folder, options, monkeypatch):
    import os
    import signal

    from ktransformers.sft.train import train

    def interrupt(line):
        if line["current_steps"] == 2 and "loss" not in line:
            os.kill(os.getpid(), signal.SIGINT)

    done = train(options(max_steps=50), watch=interrupt)
    assert done.stopped and done.steps < 10 and "adapter_model.safetensors" in done.files


@pytest.fixture
def unquantized(tokenizer, tmp_path):
    """The folder of a tiny model in floats with a tokenizer."""
    save(tiny_model("qwen3_moe", vocab_size=len(tokenizer)), tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


WHOLE = {
    "full": ({}, ["model.embed_tokens.weight", "model.layers.0.mlp.experts.0.gate_proj.weight", "model.norm.weight"]),
    "freeze": ({"freeze_trainable_layers": 1}, ["model.layers.2.mlp.experts.0.down_proj.weight", "model.layers.2.mlp.gate.weight"]),
    "first": ({"freeze_trainable_layers": -1, "freeze_trainable_modules": "experts,o_proj", "freeze_extra_modules": "norm"},
              ["model.layers.0.mlp.experts.3.up_proj.weight", "model.layers.0.self_attn.o_proj.weight", "model.norm.weight"]),
}  # fmt: skip


WITHIN = {"full": ("",), "freeze": ("model.layers.2.",),
          "first": ("model.layers.0.mlp.experts.", "model.layers.0.self_attn.o_proj.", "model.norm.")}  # fmt: skip


@pytest.mark.parametrize("case", WHOLE)
def test_weights_are_trained_whole_and_saved_as_a_model(folder, options, unquantized, case):
    from ktransformers.sft.train import train

    keys, moved = WHOLE[case]
    how = {"finetuning_type": "full" if case == "full" else "freeze", "model_name_or_path": str(unquantized), "learning_rate": 1e-3}
    done = train(options(**how, **keys, max_steps=4))
    before, after = (load_file(at / "model.safetensors") for at in (unquantized, folder / "out"))
    assert before.keys() == after.keys() and done.trained_in_experts > 0 and losses(folder)[-1] < losses(folder)[0]
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed.issuperset(moved)
    assert all(name.startswith(WITHIN[case]) for name in changed)
    with pytest.raises(SFTError, match="holds a model"):
        train(options(**how))


def test_experts_are_trained_whole_beside_adapters(folder, options, unquantized):
    from ktransformers.sft.train import train

    done = train(options(model_name_or_path=str(unquantized), kt_full_weight_grad=True))
    names = load_file(folder / "out" / "adapter_model.safetensors")
    assert "base_model.model.model.layers.1.mlp.experts.gate_up_proj" in names and done.trained_in_experts > 0
    assert not any("experts" in name and "lora" in name for name in names) and any("q_proj.lora_A" in name for name in names)
    before = load_file(unquantized / "model.safetensors")["model.layers.1.mlp.experts.0.gate_proj.weight"]
    assert not torch.equal(names["base_model.model.model.layers.1.mlp.experts.gate_up_proj"][0, :len(before)], before)


@pytest.mark.parametrize(
    ("keys", "message"),
    [({"finetuning_type": "full"}, "stored as Q"), ({"kt_full_weight_grad": True}, "experts: stored as Q"),
     ({"finetuning_type": "freeze", "freeze_trainable_layers": 99}, "found 99, expected 1 to"),
     ({"finetuning_type": "freeze", "freeze_trainable_modules": "exprts"}, "no 'exprts' .did you mean 'experts'"),
     ({"finetuning_type": "full", "stage": "dpo", "dataset": "dpo_en_demo"}, "say lora, or pref_loss orpo or simpo")],
)  # fmt: skip
def test_what_cannot_be_trained_whole_says_so(options, keys, message):
    from ktransformers.errors import KTransformersError
    from ktransformers.sft.train import train

    with pytest.raises(KTransformersError, match=message):
        train(options(**keys))


@pytest.mark.parametrize(
    ("keys", "message"),
    [({"lora_target": "q_prj"}, "lora_target: the model has no 'q_prj'"), ({"additional_target": "lm_head"}, "lm_head: stored as .*, and quantized weights are not trained"),
     ({"additional_target": "nothing"}, "no module 'nothing'"), ({"lr_scheduler_type": "wild"}, "training arguments"),
     ({"val_size": 12}, "val_size"), ({"adapter_name_or_path": "nowhere"}, "no such file"), ({"cutoff_len": 3}, "no example has an answer left")],
)  # fmt: skip
def test_what_cannot_run_says_so(options, keys, message):
    from ktransformers.errors import KTransformersError
    from ktransformers.sft.train import train

    with pytest.raises(KTransformersError, match=message):
        train(options(**keys))


def test_answers_are_scored(folder, options):
    pytest.importorskip("nltk"), pytest.importorskip("rouge_score")
    from ktransformers.sft.predict import predict, score

    assert score("the same words here", "the same words here")["predict_exact_match"] == 1
    assert score("", "words")["predict_bleu-4"] == 0 and score("人工智能", "人工智能")["predict_rouge-1"] == 1
    found = predict(options(do_train=False, do_predict=True, max_samples=2, do_sample=False, max_new_tokens=8), print, print)
    rows = [json.loads(line) for line in Path(found.file).read_text().splitlines()]
    assert len(rows) == 2 and rows[0]["label"] == "Meow, 1." and set(found.metrics) >= {"predict_bleu-4", "predict_rouge-l"}


def test_upstreams_names_resolve(checkpoint, tmp_path):
    from ktransformers.operators.experts import EXPERTS_MAP
    from ktransformers.sft.lora import KTrainer, KTransformersLinearLora, LoraConfig, get_peft_model, inject_lora_layer
    from ktransformers.sft.peft_utils.mapping import get_peft_model as theirs

    assert theirs is get_peft_model and {"KSFTExpertsCPU", "KSFTRouteExpertsCPU"} <= EXPERTS_MAP.keys()
    from tests.sft.test_peft import mine

    reference, folder = checkpoint("qwen3_moe")
    model = get_peft_model(mine(reference.config, folder), LoraConfig(r=2, target_modules=["q_proj"]))
    assert isinstance(model.base_model.model.model.layers[0].self_attn.q_proj, KTransformersLinearLora)
    model.save_pretrained(tmp_path)
    assert inject_lora_layer(mine(reference.config, folder), str(tmp_path)).peft_config and KTrainer.__init__


def test_every_option_has_a_type_that_is_checked():
    for field in fields(Options):
        if field.name not in ("passed", "notices", "kt_config"):
            with pytest.raises(SFTError, match=f"{field.name}: found"):
                made_of({field.name: ["x", {}] if "str" not in str(field.type) else {"x": 1}})
    assert yaml.safe_load("1e-4") == "1e-4"  # why numbers are read from text
