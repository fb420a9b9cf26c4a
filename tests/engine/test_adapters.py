"""Adapters in the engine: whatever else runs, an answer is that of transformers' model with its adapter alone."""

import copy
import random

import pytest
import torch

from ktransformers import native
from ktransformers.engine.batching import BatchingEngine
from ktransformers.engine.disk_blocks import DiskBlocks
from ktransformers.engine.fingerprint import fingerprint
from ktransformers.engine.forms import Forms
from ktransformers.engine.prefix_tree import PrefixTree
from ktransformers.engine.requests import Prompt, Request
from ktransformers.engine.schedule import Schedule, Ticket
from ktransformers.errors import KTransformersError
from ktransformers.operators.paged_cache import paged_cache
from ktransformers.operators.stack import decode_of
from ktransformers.sft.adapters import identity_of, load_adapter
from tests.engine.test_batching import Heard
from tests.operators.test_native_step import made
from tests.sft.test_peft import EXPERTS, adapted

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not native.available(), reason="C library not built"),
]
WHERE = {
    "qwen3_moe": [{"target_modules": ["q_proj", "v_proj"], "target_parameters": EXPERTS}, {"target_modules": ["lm_head", "o_proj"]}],
    "deepseek_v3": [{"target_modules": ["q_a_proj", "kv_b_proj"]}, {"target_modules": ["o_proj"], "target_parameters": EXPERTS}],
    "gpt_oss": [{"target_modules": ["k_proj", "o_proj"]}, {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}],
    "qwen3_next": [{"target_modules": ["q_proj", "in_proj_qkvz"]}, {"target_parameters": EXPERTS, "target_modules": ["out_proj"]}],
}  # fmt: skip
"""Plain, latents, windows, delta nets -> what each of two adapters changes."""
GIB = 1 << 30


class Given:
    """A model of ours with two adapters, "a" and "b", and transformers' model of each form."""

    def __init__(self, family, factory):
        reference, self.model = made(family, factory)
        self.paths, self.right = {}, {"": reference}
        for seed, (name, targets) in enumerate(zip("ab", WHERE[family], strict=True)):
            right = adapted(copy.deepcopy(reference), seed=seed, **targets)
            for tensor_name, tensor in right.named_parameters():
                if "modules_to_save" in tensor_name:
                    tensor.data.mul_(1.5)
            self.paths[name] = factory.mktemp(family) / name
            right.save_pretrained(self.paths[name])
            self.right[name] = right.eval()
        self.before = self.logits(list(range(2, 40)))
        self.forms = self.put(self.paths)

    def put(self, paths):
        forms = Forms(self.model)
        for name, path in paths.items():
            forms.add(name, lambda model, path=path: load_adapter(model, path), identity_of(path))
        return forms

    @torch.no_grad()
    def logits(self, ids):
        return self.model(torch.tensor([ids]), past_key_values=paged_cache(self.model), use_cache=True).logits

    @torch.no_grad()
    def expected(self, name, ids, count):
        ids = list(ids)
        for _ in range(count):
            ids.append(int(self.right[name](torch.tensor([ids])).logits[0, -1].argmax()))
        return ids[-count:]


@pytest.fixture(scope="module", params=WHERE)
def given(request, tmp_path_factory):
    return Given(request.param, tmp_path_factory)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return Given("qwen3_moe", tmp_path_factory)


def asked(count, seed=0, most=90):
    """(adapter, prompt) of so many requests."""
    chance = random.Random(seed)
    return [(("", "a", "b")[i % 3], [chance.randrange(2, 90) for _ in range(chance.randrange(2, most))]) for i in range(count)]


def test_answers_are_those_of_each_adapter_alone_whatever_else_runs(given):
    requests = asked(9)
    engine = BatchingEngine(given.model, max_running=5, chunk_size=24, forms=given.forms)
    heard = [Heard.of(engine, Request(ids, 6, adapter=name)) for name, ids in requests]
    found = [one.wait().tokens() for one in heard]
    engine.close()
    right = [given.expected(name, ids, 6) for name, ids in requests]
    assert found == right
    others = [given.expected("" if name else "a", ids, 6) for name, ids in requests]
    assert sum(one != other for one, other in zip(right, others, strict=True)) > 5  # adapters say something


def test_the_model_alone_is_as_it_was(given):
    for name in ("a", "b", ""):
        given.forms.use(name)
        torch.manual_seed(0)
        same = torch.equal(given.logits(list(range(2, 40))), given.before)
        assert same is (name == "")


def test_the_model_alone_keeps_its_recorded_step(plain):
    """Adapters that nobody asks for cost nothing: nothing stands around the modules, and nothing is made anew."""
    for name in ("a", ""):
        plain.forms.use(name)
        cache = paged_cache(plain.model)
        with torch.inference_mode():
            plain.model(torch.tensor([[3, 4, 5]]), past_key_values=cache, use_cache=True)
            assert (decode_of(plain.model, cache) is not None) is (name == "")
            if not name:
                stack, once = plain.model.model.stack, plain.model.model.stack.ready()
                plain.forms.use("b"), plain.forms.use("")
                assert plain.model.model.stack is stack and stack.ready() is once


def test_memory_of_adapters_is_counted(plain):
    sizes = {name: sum(t.nbytes for n, t in plain.right[name].named_parameters() if "lora_" in n) for name in "ab"}
    assert plain.forms.nbytes() == {name: {"cpu": size} for name, size in sizes.items()} and min(sizes.values()) > 1000


# --- prefixes -----------------------------------------------------------------------------------------------

LONG = [2 + (i * 7) % 90 for i in range(200)]


def cached(engine, given, name, ids=LONG):
    """Tokens of the prompt that were not computed; the answer is right in any case."""
    heard = Heard.of(engine, Request(ids, 4, adapter=name)).wait()
    assert heard.tokens() == given.expected(name, ids, 4), name
    return next(event.cached_tokens for event in heard.events if isinstance(event, Prompt))


def test_pages_of_one_adapter_are_no_others(given):
    tree = PrefixTree(given.model, b"numbers", GIB)
    engine = BatchingEngine(given.model, chunk_size=64, prefixes=tree, forms=given.forms)
    assert [cached(engine, given, name) for name in ("a", "", "b")] == [0, 0, 0]
    assert [cached(engine, given, name) for name in ("b", "", "a")] == [192, 192, 192]
    engine.close()


def test_pages_on_disk_are_found_by_what_an_adapter_is_not_by_its_name(given, tmp_path):
    given.forms.use("")
    key = fingerprint(given.model)

    def engine_of(forms):
        disk = DiskBlocks(tmp_path, GIB, key)
        tree = PrefixTree(given.model, key, GIB, disk)
        return BatchingEngine(given.model, chunk_size=64, prefixes=tree, forms=forms), disk

    engine, disk = engine_of(given.forms)
    assert cached(engine, given, "a") == cached(engine, given, "") == 0
    engine.close(), disk.flush(30), disk.close()
    exchanged = given.put({"b": given.paths["a"], "a": given.paths["b"]})
    assert fingerprint(given.model) == key
    given.right["a"], given.right["b"] = given.right["b"], given.right["a"]
    engine, disk = engine_of(exchanged)
    assert {name: cached(engine, given, name) for name in ("a", "b", "")} == {"a": 0, "b": 192, "": 192}
    given.right["a"], given.right["b"] = given.right["b"], given.right["a"]
    engine.close(), disk.close()
    exchanged.use("")


def test_an_adapter_is_told_by_its_contents(plain, tmp_path):
    from safetensors.torch import load_file, save_file

    one, other = (identity_of(plain.paths[name]) for name in "ab")
    copied = tmp_path / "copy"
    copied.mkdir()
    for file in plain.paths["a"].iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    assert identity_of(copied) == one != other
    tensors = load_file(copied / "adapter_model.safetensors")
    last = sorted(tensors)[-1]
    tensors[last].view(-1)[-1] += 1e-3  # no sample would find it
    save_file(tensors, copied / "adapter_model.safetensors", metadata={"format": "pt"})
    assert identity_of(copied) != one
    settings = plain.paths["a"] / "adapter_config.json"
    (copied / "adapter_model.safetensors").write_bytes((plain.paths["a"] / "adapter_model.safetensors").read_bytes())
    (copied / "adapter_config.json").write_text(settings.read_text().replace('"lora_alpha": 8', '"lora_alpha": 16'))
    assert identity_of(copied) != one


# --- turns --------------------------------------------------------------------------------------------------


def test_every_answer_gets_a_token_at_every_step(plain):
    """However many answers an adapter has, and however long they are."""
    schedule = Schedule(plain.model, 8, 64, 256, None, None, plain.forms)
    names = ["a", "a", "a", "b", "", "a"]
    heard = [Heard() for _ in names]
    for order, (name, one) in enumerate(zip(names, heard, strict=True)):
        schedule.add(Ticket(Request([5 + order, 6, 7], 30, adapter=name), one, order))
    schedule.step()
    counts = []
    for _ in range(5):
        schedule.step()
        counts.append([len(one.tokens()) for one in heard])
    assert counts == [[n] * 6 for n in range(2, 7)] and schedule.load.running == 6
    schedule.end_all("cancelled")
    assert schedule.is_empty and all(one.ends == {0: "cancelled"} for one in heard)


def test_a_step_that_fails_ends_the_answers_of_its_adapter_alone(plain, monkeypatch):
    schedule = Schedule(plain.model, 8, 64, 256, None, None, plain.forms)
    names = ["", "a", "b", "a"]
    heard = [Heard() for _ in names]
    for order, (name, one) in enumerate(zip(names, heard, strict=True)):
        schedule.add(Ticket(Request([5 + order, 6, 7], 4, adapter=name), one, order))
    schedule.step()
    plain.forms.use("a")
    projection = plain.model.model.layers[0].self_attn.q_proj
    plain.forms.use("")
    with monkeypatch.context() as patched:
        patched.setattr(projection, "forward", lambda *args, **kwargs: 1 / 0)
        schedule.step()
    while not schedule.is_empty:
        schedule.step()
    assert [one.ends[0] for one in heard] == ["length", "error", "length", "error"]
    for name, order in (("", 0), ("b", 2)):
        assert heard[order].tokens() == plain.expected(name, [5 + order, 6, 7], 4)


def test_answers_make_room_and_come_back_with_their_adapter(plain):
    probe = BatchingEngine(plain.model, forms=plain.forms)
    Heard.of(probe, Request(LONG, 1)).wait()
    page = probe._schedule._page_bytes
    probe.close()
    engine = BatchingEngine(plain.model, chunk_size=40, cache_bytes=page * 5, forms=plain.forms)
    prompts = [(name, LONG[i : i + 60]) for i, name in enumerate(["a", "", "b", "a"])]
    heard = [Heard.of(engine, Request(ids, 40, adapter=name)) for name, ids in prompts]
    found = [one.wait().tokens() for one in heard]
    assert engine.load().preemptions and found == [plain.expected(name, ids, 40) for name, ids in prompts]
    engine.close()


def test_several_answers_and_scores_of_the_prompt(plain):
    engine = BatchingEngine(plain.model, chunk_size=64, forms=plain.forms)
    heard = [Heard.of(engine, Request(LONG[:70], 4, n=2, prompt_logprobs=0, adapter=name)) for name in ("a", "")]
    for name, one in zip(("a", ""), heard, strict=True):
        one.wait()
        right = plain.expected(name, LONG[:70], 4)
        assert one.tokens(0) == one.tokens(1) == right
        with torch.no_grad():
            logits = plain.right[name](torch.tensor([LONG[:70]])).logits[0].log_softmax(-1)
        scores = [logits[i, token].item() for i, token in enumerate(LONG[1:70])]
        found = next(event.logprobs for event in one.events if isinstance(event, Prompt))
        assert [each.chosen for each in found] == pytest.approx(scores, abs=2e-3)
    engine.close()


# --- what is refused ----------------------------------------------------------------------------------------


def test_an_unknown_adapter_is_refused(plain):
    for forms, known in ((plain.forms, "a, b"), (None, "none at all")):
        engine = BatchingEngine(plain.model, forms=forms)
        with pytest.raises(KTransformersError, match=f"adapter: found 'c', expected one of: {known}"):
            engine.submit(Request([3], 1, adapter="c"), lambda event: None)
        engine.close()


def test_what_cannot_be_put_leaves_the_model_as_it_was(plain):
    def half(model):
        load_adapter(model, plain.paths["a"])
        raise KTransformersError("and then it failed")

    with pytest.raises(KTransformersError, match="and then it failed"):
        plain.forms.add("c", half, b"c")
    with pytest.raises(KTransformersError, match="one of this name already"):
        plain.forms.add("a", half, b"c")
    assert plain.forms.names == ["a", "b"]
    plain.forms.use("")
    assert torch.equal(plain.logits(list(range(2, 40))), plain.before)
    assert not hasattr(plain.model, "peft_config")
