"""Tied weights: what is one tensor is told from the checkpoint, in both formats, as from_pretrained tells it."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from ktransformers import config_from_gguf, optimize_and_load
from ktransformers.errors import WeightError
from ktransformers.gguf_files.write import quantize_folder
from ktransformers.loaders import bind, open_weights
from ktransformers.operators import base_operator
from tests.tiny import meta_model, random_ids, relative_error, tiny_model

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(autouse=True)
def warn_again(monkeypatch):
    monkeypatch.setattr(base_operator, "_told", set())


def folder(path, *, tied: bool, head=None, drop=()):
    """A checkpoint whose config says `tied`, with `head` in place of its lm_head and without the tensors `drop`."""
    model = tiny_model("qwen3_moe", tie_word_embeddings=False, num_hidden_layers=1)
    model.save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    if head is not None:
        tensors[HEAD] = head(tensors)
    save_file({n: t for n, t in tensors.items() if n not in drop}, path / "model.safetensors", {"format": "pt"})
    said = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(said | {"tie_word_embeddings": tied}))
    return path


def truth(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")


def loaded(path, weights=None, rule="Default"):
    return optimize_and_load(meta_model(AutoConfig.from_pretrained(path)), rule, weights or path, progress=False)


def agrees(ours, theirs):
    ids = random_ids(1, 12)
    with torch.no_grad():
        return relative_error(ours(ids).logits, theirs(ids).logits) < 1e-4


def same_as_embedding(tensors):
    return tensors[EMBEDDING].clone()


def one_number_differs(tensors):
    head = tensors[EMBEDDING].clone()
    head[-1, -1] += 1
    return head


HEADS = [None, same_as_embedding, one_number_differs]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head", HEADS)
def test_safetensors_agree_with_transformers(tmp_path, tied, head):
    path = folder(tmp_path, tied=tied, head=head)
    theirs = truth(path)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ours = loaded(path)
    assert agrees(ours, theirs)
    assert torch.equal(ours.lm_head.weight, theirs.lm_head.weight)
    shared = theirs.lm_head.weight is theirs.model.embed_tokens.weight
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == shared
    assert ours.all_tied_weights_keys == theirs.all_tied_weights_keys
    assert any("they differ" in str(w.message) for w in told) == (tied and head is not same_as_embedding)


@pytest.mark.parametrize("missing", [HEAD, EMBEDDING])
@pytest.mark.parametrize("rule", ["Default", [{"match": {"name": "lm_head"}, "replace": {
    "class": "ktransformers.operators.linear.KTransformersLinear", "kwargs": {"generate_device": "cpu"}}}]])  # fmt: skip
def test_either_of_two_tied_tensors_will_do(tmp_path, missing, rule):
    path = folder(tmp_path, tied=True, head=same_as_embedding, drop=[missing])
    assert agrees(loaded(path, rule=rule), truth(path))


def test_without_both_the_error_names_both(tmp_path):
    path = folder(tmp_path, tied=True, drop=[HEAD, EMBEDDING])
    with pytest.raises(WeightError, match=r"embed_tokens\.weight: missing(.|\n)*lm_head\.weight: missing"):
        loaded(path)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("drop", [(), [EMBEDDING]])
def test_the_writer_keeps_a_head_of_its_own(tmp_path, head, drop):
    """And a .gguf with such a head is right with the folder's tied config as well as by itself."""
    if drop and head is not same_as_embedding:
        pytest.skip("a tied checkpoint without embedding has one tensor")
    path = folder(tmp_path / "hf", tied=True, head=head, drop=drop)
    quantize_folder(path, tmp_path / "m.gguf", "F32")
    own = head is not same_as_embedding
    with open_weights(tmp_path / "m.gguf") as files:
        assert ("output.weight" in files) == own and "token_embd.weight" in files
    assert config_from_gguf(tmp_path / "m.gguf").tie_word_embeddings is not own
    assert agrees(loaded(path, tmp_path / "m.gguf"), truth(path))


def test_equal_numbers_of_different_types_are_one_tensor(tmp_path):
    path = folder(tmp_path, tied=True, head=lambda tensors: tensors[EMBEDDING].bfloat16().float())
    tensors = load_file(path / "model.safetensors")
    tensors[EMBEDDING] = tensors[HEAD].bfloat16()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with open_weights(path) as files:
        assert bind(files, meta_model(AutoConfig.from_pretrained(path))).same(HEAD, EMBEDDING)
    ours = loaded(path)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight and agrees(ours, truth(path))
