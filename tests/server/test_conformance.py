"""Tools that others wrote to try such servers: lm-eval on the embedded model, schemathesis on the interface's description.

Neither is among the tests' requirements, being large: `pip install "lm_eval[api]==0.4.13" schemathesis==4.32.5`.
"""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from ktransformers.models import embedded_model

from ktransformers import native
from ktransformers.server.service import Served, Service, Settings
from tests.server.support import VOCABULARY, listening, saying, service, tokenizer

QUESTIONS = [
    {"q": "What is a rule file?", "c": [" A rule file is a short YAML list.", " Nothing at all.", " A kind of cheese"]},
    {"q": "Experts run on the", "c": [" CPU", " moon", " GPU"]},
    {"q": "Rules say where modules", "c": [" run", " sleep"]},
]
TASKS = {
    "kt_choice": {
        "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "{{c}}", "doc_to_target": 0, "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    },
    "kt_generate": {
        "output_type": "generate_until", "doc_to_text": "{{q}}", "doc_to_target": "{{c[0]}}",
        "generation_kwargs": {"until": ["Q:", "short"], "max_gen_toks": 16}, "metric_list": [{"metric": "exact_match"}],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def whole():
    """The embedded model in float32 behind a server, and transformers' own."""
    batching = pytest.importorskip("ktransformers.engine.batching")
    from transformers import AutoModelForCausalLM

    from ktransformers.configs import meta_model, read_config
    from ktransformers.optimize import optimize_and_load

    config = read_config(embedded_model())
    config.dtype = torch.float32
    native.set_exact(True)
    model = optimize_and_load(meta_model(config), "DeepSeek-V3", embedded_model() / "model.safetensors", devices={"cuda": "cpu"}, progress=False)
    engine = batching.BatchingEngine(model)
    theirs = AutoModelForCausalLM.from_pretrained(embedded_model(), local_files_only=True, dtype=torch.float32).eval()
    with listening(Service(Settings(), Served(engine, tokenizer(), VOCABULARY, model.generation_config))) as url:
        yield url, theirs
    native.set_exact(False)


def likelihood(model, question, choice):
    """The logarithm of how likely `model` finds the tokens of a choice after a question, as lm-eval counts it."""
    before, ids = (len(tokenizer().encode(question)), tokenizer().encode(question + choice))
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(logits[i - 1, ids[i]]) for i in range(before, len(ids)))


def evaluated(task, model, address, folder, **options):
    """What lm-eval gets from each question of a task."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    (folder / "data.jsonl").write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    data = {"task": task, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}}, "test_split": "test"}
    (folder / "task.yaml").write_text(json.dumps(data | TASKS[task]))
    arguments = {"model": str(embedded_model()), "base_url": address, "num_concurrent": 2, "max_retries": 1} | options.pop("arguments", {})
    found = lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=[task], task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        log_samples=True, cache_requests=False, **options,
    )  # fmt: skip
    return [sample["filtered_resps"] for sample in sorted(found["samples"][task], key=lambda sample: sample["doc_id"])]


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@pytest.mark.parametrize("tokens", [False, True])
def test_lm_eval_finds_the_likelihoods_of_transformers(whole, tmp_path, tokens):
    url, theirs = whole
    arguments = {"tokenized_requests": tokens, "tokenizer_backend": "huggingface"}
    found = evaluated("kt_choice", "local-completions", f"{url}/v1/completions", tmp_path, arguments=arguments)
    ours = [[one[0] for one in each] for each in found]
    wanted = [[likelihood(theirs, one["q"], choice) for choice in one["c"]] for one in QUESTIONS]
    for one, other in zip(ours, wanted, strict=True):
        assert one == pytest.approx(other, abs=1e-3)


def test_lm_eval_gets_texts_that_end_where_it_says(whole, tmp_path):
    url, _ = whole
    found = evaluated("kt_generate", "local-chat-completions", f"{url}/v1/chat/completions", tmp_path, apply_chat_template=True)
    assert all(isinstance(text, str) and "short" not in text for (text,) in found) and found[0][0].strip()


def test_schemathesis_finds_no_answer_that_the_description_does_not_have():
    if find_spec("schemathesis") is None:
        pytest.skip("schemathesis is not installed")
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,unsupported_method"
    with listening(service(says=saying("a x b"))) as url:
        ran = subprocess.run(
            [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--checks", checks, "--max-examples", "10",
             "--phases", "coverage,fuzzing", "--seed", "1"],
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-5000:]
