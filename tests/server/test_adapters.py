"""Adapters as models of their own names: which one computes, what answers carry, what is refused at start."""

import asyncio
import copy
import json
import shutil

import httpx
import pytest
import torch
from ktransformers.models import embedded_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from ktransformers import cli, native
from ktransformers.cli import serve
from ktransformers.cli.adapters import asked_adapters
from ktransformers.cli.serve import ServeOptions
from ktransformers.errors import KTransformersError, UnsupportedError, WeightError
from ktransformers.gguf_files.lora import peft_to_gguf
from ktransformers.server.app import create_app
from ktransformers.server.page_files import Page
from ktransformers.server.service import Service, Settings
from tests.server.support import HELLO, TEXT, ask, events, ids, service, tokenizer
from tests.sft.test_peft import EXPERTS, adapted
from tests.tiny import tiny_model

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
CHAT = "/v1/chat/completions"
NAMED = Settings(names=("tiny", "alias"), adapters={"polite": "polite-lora", "org/terse": "terse.gguf"})


def settled(**more):
    return service(settings=NAMED, **more)


# ---- what the endpoints make of names ----------------------------------------------------------------------


def test_models_are_the_base_and_every_adapter():
    for one in (Service(NAMED), settled()):  # while the model is loaded, too
        found = [(m["id"], m["root"], m["parent"]) for m in ask(one, "/v1/models").json()["data"]]
        assert found == [
            ("tiny", "tiny", None), ("alias", "tiny", None), ("polite", "polite-lora", "tiny"),
            ("org/terse", "terse.gguf", "tiny"),
        ]  # fmt: skip
        assert ask(one, "/v1/models/org/terse").json()["parent"] == "tiny"
    assert ask(settled(), "/props").json()["names"] == ["tiny", "alias", "polite", "org/terse"]  # the page's picker


@pytest.mark.parametrize(
    ("path", "body", "name_in"),
    [
        (CHAT, {"messages": HELLO}, lambda found: found["model"]),
        ("/v1/completions", {"prompt": "Once"}, lambda found: found["model"]),
        ("/v1/responses", {"input": "Hello"}, lambda found: found.get("response", found).get("model", None)),
        ("/v1/messages", {"messages": HELLO, "max_tokens": 9}, lambda found: found.get("message", found).get("model", None)),
    ],
    ids=["chat", "completions", "responses", "messages"],
)
def test_a_request_names_its_adapter_and_so_does_its_answer(path, body, name_in):
    for asked, adapter, answered in (
        ("polite", "polite", "polite"), ("org/terse", "org/terse", "org/terse"), ("tiny", "", "tiny"),
        ("alias", "", "alias"), (None, "", "tiny"),
    ):  # fmt: skip
        one = settled()
        for stream in (False, True):
            given = body | {"stream": stream} | ({} if asked is None else {"model": asked})
            response = ask(one, path, given)
            assert response.status_code == 200, response.text
            said = [event for event in events(response) if event] if stream else [response.json()]
            assert {name for event in said if (name := name_in(event) if "model" in json.dumps(event) else None)} == {answered}
        assert [request.adapter for request in one.served.engine.requests] == [adapter] * 2


@pytest.mark.parametrize(
    ("path", "body"),
    [(CHAT, {"messages": HELLO}), ("/v1/completions", {"prompt": "a"}), ("/v1/responses", {"input": "a"}),
     ("/v1/messages", {"messages": HELLO, "max_tokens": 3})],
    ids=["chat", "completions", "responses", "messages"],
)  # fmt: skip
def test_an_unknown_name_is_answered_by_nobody(path, body):
    """Not by the base: it would be taken for an adapter."""
    one = settled()
    response = ask(one, path, body | {"model": "polit"})
    assert response.status_code == 404 and "expected one of: tiny, alias, polite, org/terse" in response.text
    if path != "/v1/messages":
        assert response.json()["error"]["code"] == "model_not_found"
    assert one.served.engine.requests == []
    assert ask(service(), CHAT, {"model": "polit", "messages": HELLO}).status_code == 200  # any will do without adapters


# ---- what --adapter says -----------------------------------------------------------------------------------


def test_a_path_is_for_all_requests_and_a_name_makes_a_model(tmp_path, monkeypatch):
    assert asked_adapters([], ["m"]).named == {} and asked_adapters([], ["m"]).root is None
    found = asked_adapters([f"{tmp_path}/out"], ["m"])
    assert (found.path, found.named, found.root) == (f"{tmp_path}/out", {}, "out")
    found = asked_adapters(["a=x/cat", "b/c=y=z.gguf"], ["m"])
    assert (found.path, found.named, found.roots) == ("", {"a": "x/cat", "b/c": "y=z.gguf"}, {"a": "cat", "b/c": "y=z.gguf"})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1e-4").mkdir()
    assert asked_adapters(["lr=1e-4"], ["m"]).path == "lr=1e-4"  # what is there is a path


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["=x"], "expected PATH or NAME=PATH"),
        (["a="], "expected PATH or NAME=PATH"),
        (["a=x", "a=y"], "'a' is another adapter's"),
        (["m=x"], "'m' is the model's own"),
        (["x", "y"], "Give each a name"),
        (["x", "a=y"], "Give each a name"),
    ],
)
def test_options_of_no_sense(given, said):
    with pytest.raises(KTransformersError, match=said):
        asked_adapters(given, ["m"])


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(one) for one in arguments])


@pytest.mark.parametrize("program", ["serve", "run"])
def test_a_path_that_is_none_is_told_before_anybody_is_let_in(program, tmp_path):
    (tmp_path / "empty").mkdir()
    for path, said in ((tmp_path / "none", "no such file or folder"), (tmp_path / "empty", "adapter_config.json")):
        ran = run(program, "--port", "0", "--adapter", f"a={path}")
        assert ran.exit_code == 1 and said in ran.stderr and str(path) in ran.stderr and not ran.stdout


# ---- a model with its adapters -----------------------------------------------------------------------------

real = pytest.mark.skipif(not native.available(), reason="C library not built")
TARGETS = {
    "polite": {"target_modules": ["o_proj"], "target_parameters": EXPERTS},
    "terse": {"target_modules": ["q_a_proj", "o_proj"]},
}
PROMPT = "What is a rule file? " * 24
"""More than one block of the prefix cache."""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """The embedded model in float32, so that rounding decides no token."""
    folder = tmp_path_factory.mktemp("models") / "base"
    shutil.copytree(embedded_model(), folder, ignore=shutil.ignore_patterns("*.gguf", "*.safetensors"))
    AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(model_folder, tmp_path_factory):
    """Name -> (path, transformers' model with it): "polite" is a PEFT folder, "terse" a GGUF file, "base" none."""
    folder = tmp_path_factory.mktemp("trained")
    found = {"base": ("", AutoModelForCausalLM.from_pretrained(model_folder).eval())}
    for seed, (name, targets) in enumerate(TARGETS.items()):
        model = AutoModelForCausalLM.from_pretrained(model_folder)
        config = copy.deepcopy(model.config)
        model = adapted(model, seed=seed, **targets)
        for tensor_name, tensor in model.named_parameters():
            if "lora_B" in tensor_name:
                tensor.data.mul_(8)
        model.save_pretrained(folder / name)
        path = folder / name if name == "polite" else peft_to_gguf(folder / name, folder / "terse.gguf", config)
        found[name] = path, model.eval()
    return found


@pytest.fixture(scope="module")
def serving(model_folder, trained):
    """What `kt serve` makes of the model and both."""
    named = [f"{name}={path}" for name, (path, _) in trained.items() if path]
    options = ServeOptions(str(model_folder), adapter=named, as_json=True, cache_ram="64MiB", chunk_size=64)
    one = Service(serve._settings(options), serve.open_model(options))
    yield one
    one.served.engine.close()
    one.served.after()


@torch.no_grad()
def greedy(model, prompt, count):
    said = list(prompt)
    for _ in range(count):
        said.append(int(model(torch.tensor([said])).logits[0, -1].argmax()))
    return said[len(prompt) :]


def asked_at_once(one, requests):
    async def all_of_them():
        transport = httpx.ASGITransport(create_app(one, Page()))
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=120) as client:
            return await asyncio.gather(*(client.post("/v1/completions", json=body) for body in requests))

    return [response.json() for response in asyncio.run(all_of_them())]


def completion(name, prompt, **more):
    return {"model": name, "prompt": prompt, "max_tokens": 5, "temperature": 0, "ignore_eos": True, **more}


@real
def test_each_name_answers_as_its_adapter_alone_also_all_at_once(serving, trained, exact):
    prompts = [ids(TEXT)[:7], ids(PROMPT)]
    right = {name: [greedy(model, prompt, 5) for prompt in prompts] for name, (_, model) in trained.items()}
    assert len({str(said) for said in right.values()}) == 3
    requests = [completion(name, prompt) for prompt in prompts for name in [*trained] * 2]
    found = asked_at_once(serving, requests)
    for body, answer in zip(requests, found, strict=True):
        expected = right[body["model"]][prompts.index(body["prompt"])]
        whole, begun = (tokenizer().decode(said, skip_special_tokens=True) for said in (body["prompt"] + expected, body["prompt"]))
        assert begun + answer["choices"][0]["text"] == whole
        assert answer["model"] == body["model"]


@real
def test_cached_tokens_are_those_of_the_same_name(serving):
    prompt = ids("Nobody has asked this before: " + PROMPT)
    counts = []
    for name in ("polite", "base", "terse", "polite", "base", "terse"):
        (found,) = asked_at_once(serving, [completion(name, prompt)])
        counts.append(found["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert counts == [0, 0, 0] + [(len(prompt) - 1) // 64 * 64] * 3 and counts[-1] > 0


@real
def test_memory_of_adapters_is_told(serving, trained):
    models = [model for path, model in trained.values() if path]
    size = sum(t.nbytes for model in models for n, t in model.named_parameters() if "lora_" in n)
    (cpu,) = ask(serving, "/kt/machine").json()["devices"][:1]
    assert cpu["adapters"] == size > 0
    assert ask(serving, "/v1/models").json()["data"][1] | {"created": 0} == {
        "id": "polite", "object": "model", "created": 0, "owned_by": "ktransformers", "root": "polite", "parent": "base",
        "max_model_len": serving.served.engine.context,
    }  # fmt: skip


# ---- files that do not fit ---------------------------------------------------------------------------------


def of_another_model(folder, family="deepseek_v3", **sizes):
    adapted(tiny_model(family, **sizes), target_modules=["o_proj"]).save_pretrained(folder)
    return folder


def damaged(folder):
    file = of_another_model(folder) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return folder


def of_no_settings(folder):
    (of_another_model(folder) / "adapter_config.json").write_text('{"peft_type": "LORA", ')
    return folder


def without_weights(folder):
    (of_another_model(folder) / "adapter_model.safetensors").unlink()
    return folder


def cut_off(folder):
    config = tiny_model("deepseek_v3").config
    file = peft_to_gguf(of_another_model(folder), folder.with_suffix(".gguf"), config)
    file.write_bytes(file.read_bytes()[:-100])
    return file


def of_another_kind(folder):
    config = folder / "adapter_config.json"
    of_another_model(folder)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_type": "IA3"}))
    return folder


@real
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (of_another_model, "does not fit the model"),
        (lambda folder: of_another_model(folder, "qwen3_moe"), "does not fit the model"),
        (damaged, "adapter_model.safetensors"),
        (of_no_settings, "adapter_config.json"),
        (without_weights, "adapter_model.safetensors: cannot be read"),
        (cut_off, r"\.gguf"),
        (of_another_kind, "peft_type is 'IA3'"),
    ],
    ids=["shapes", "family", "damaged", "settings", "weights", "cut off", "kind"],
)
def test_what_does_not_fit_is_refused_at_start_by_its_file(make, said, tmp_path, trained, model_folder):
    path = make(tmp_path / "wrong")
    fine = f"polite={trained['polite'][0]}"
    with pytest.raises((WeightError, UnsupportedError), match=said) as raised:
        serve.open_model(ServeOptions(str(model_folder), adapter=[fine, f"other={path}"], as_json=True))
    assert str(path) in str(raised.value)
