"""Every field of a GenerationConfig means what it means to `model.generate`, or is in a table with the reason."""

import copy

import pytest
import torch
from transformers import GenerationConfig, TopKLogitsWarper

from ktransformers.engine.generate import generate
from ktransformers.engine.sampling import UNHONOURED, WITHOUT_EFFECT, Chooser, OnCandidates, Sampling
from ktransformers.errors import KTransformersError
from tests.tiny import tiny_model

PROMPT = [5, 9, 2, 33, 7, 41, 12, 8, 9, 2, 27]
STOP = 125

HONOURED = {
    "temperature": {"do_sample": True, "temperature": 3.0},
    "top_k": {"do_sample": True, "temperature": 3.0, "top_k": 2},
    "top_p": {"do_sample": True, "temperature": 3.0, "top_p": 0.4},
    "min_p": {"do_sample": True, "temperature": 3.0, "min_p": 0.5},
    "top_h": {"do_sample": True, "temperature": 3.0, "top_h": 0.3},
    "typical_p": {"do_sample": True, "temperature": 3.0, "typical_p": 0.3},
    "epsilon_cutoff": {"do_sample": True, "temperature": 3.0, "epsilon_cutoff": 0.05},
    "eta_cutoff": {"do_sample": True, "temperature": 9.0, "eta_cutoff": 0.99},
    "do_sample": {"do_sample": True, "temperature": 5.0},
    "repetition_penalty": {"repetition_penalty": 9.0},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 9.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1, "sequence_bias": [[[9], 30.0]]},
    "bad_words_ids": {"bad_words_ids": "first"},
    "suppress_tokens": {"suppress_tokens": "first"},
    "begin_suppress_tokens": {"begin_suppress_tokens": "first"},
    "sequence_bias": {"sequence_bias": [[[60], 30.0]]},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (1, 3.0)},
    "min_new_tokens": {"min_new_tokens": 6, "eos_token_id": "first"},
    "min_length": {"min_length": len(PROMPT) + 6, "eos_token_id": "first"},
    "forced_eos_token_id": {"forced_eos_token_id": STOP + 1},
    "forced_bos_token_id": {"forced_bos_token_id": 50},
    "remove_invalid_values": {"remove_invalid_values": True},
    "renormalize_logits": {"do_sample": True, "temperature": 3.0, "renormalize_logits": True},
    "guidance_scale": {"guidance_scale": 4.0},
    "watermarking_config": {"watermarking_config": {"bias": 30.0, "greenlist_ratio": 0.2}},
    "eos_token_id": {"eos_token_id": [STOP, "first"]},
}
"""Field -> settings in which it matters. "first" is the token that greedy decoding chooses first."""

ELSEWHERE = {"max_new_tokens", "max_length", "max_time", "stop_strings"}
"""Honoured, with tests of their own below, and for the lengths in the tests of the chat program."""

WITHOUT_A_DIFFERENCE = {"remove_invalid_values", "renormalize_logits", "forced_bos_token_id"}
"""They change scores that are not finite, scores that are compared only, and answers to a prompt of one token."""


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3_moe")


def ours(model, prompt=PROMPT, count=10, seed=0, **config):
    torch.manual_seed(seed)
    sampling = Sampling(GenerationConfig(**{"eos_token_id": STOP} | config))
    return list(generate(model, prompt, max_new_tokens=count, sampling=sampling))


def theirs(model, prompt=PROMPT, count=10, seed=0, **config):
    torch.manual_seed(seed)
    config = GenerationConfig(**{"eos_token_id": STOP} | config, max_new_tokens=count)
    stops = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    tokens = model.generate(torch.tensor([prompt]), generation_config=config)[0, len(prompt) :].tolist()
    return tokens[:-1] if tokens[-1] in stops else tokens


def test_every_field_is_honoured_or_in_a_table():
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    tables = [set(HONOURED), ELSEWHERE, set(UNHONOURED), set(WITHOUT_EFFECT)]
    assert sum(map(len, tables)) == len(set().union(*tables))
    assert not fields - set().union(*tables), "transformers has fields that nobody looked at"


@pytest.mark.parametrize("field", HONOURED)
def test_tokens_equal_those_of_transformers(model, field):
    first = theirs(model, eos_token_id=None)[0]
    known = {name: first if value == "first" else value for name, value in HONOURED[field].items()}
    known = {n: [first if i == "first" else i for i in v] if isinstance(v, list) else v for n, v in known.items()}
    if field in ("bad_words_ids", "suppress_tokens", "begin_suppress_tokens"):
        known[field] = [[first]] if field == "bad_words_ids" else [first]
    expected = [theirs(model, seed=seed, **known) for seed in range(3)]
    assert [ours(model, seed=seed, **known) for seed in range(3)] == expected
    without = {name: value for name, value in known.items() if name != field}
    if field not in WITHOUT_A_DIFFERENCE:
        assert [theirs(model, seed=seed, **without) for seed in range(3)] != expected, "the settings say nothing"


def test_a_prompt_of_one_token_is_followed_by_the_forced_one(model):
    assert ours(model, [5], forced_bos_token_id=50)[0] == theirs(model, [5], forced_bos_token_id=50)[0] == 50


def test_an_unset_top_k_is_that_of_transformers(model):
    chosen = Chooser(Sampling(GenerationConfig(do_sample=True)), model, PROMPT, 5).processors
    assert [type(one) for one in chosen] == [TopKLogitsWarper] and chosen[0].top_k == 50


@pytest.mark.parametrize("last", [{}, {"top_p": 0.7}, {"min_p": 0.1}, {"typical_p": 0.8}, {"epsilon_cutoff": 0.02},
                                  {"eta_cutoff": 0.3}, {"top_p": 0.9, "renormalize_logits": True}])  # fmt: skip
def test_what_follows_top_k_is_computed_on_what_it_leaves(model, last):
    """The scores of transformers' own processors; ties at the k-th place included, but for top-p, which leaves it to an
    unstable sort which of them stay."""
    config = GenerationConfig(do_sample=True, temperature=0.7, top_k=9, repetition_penalty=1.3, **last)
    made = Chooser(Sampling(config), model, PROMPT, 5).processors
    assert any(isinstance(one, OnCandidates) for one in made) == bool(last)
    sampling = copy.deepcopy(Sampling(config).config)
    theirs_made = model._get_logits_processor(sampling, input_ids_seq_length=len(PROMPT), device="cpu")
    ids = torch.tensor([PROMPT])
    for seed in range(5):
        scores = torch.randn(1, 128, generator=torch.Generator().manual_seed(seed)) * 3
        if "top_p" not in last:
            scores[0, scores[0].topk(11).indices[7:]] = scores[0].topk(8).values[-1]
        found, expected = made(ids, scores.clone()), theirs_made(ids, scores.clone())
        assert torch.equal(found.isinf(), expected.isinf())
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_greedy_takes_the_first_of_the_largest(model, dtype):
    choose = Chooser(Sampling(), model, PROMPT, 5)
    for seed in range(20):
        logits = torch.randn(3000, generator=torch.Generator().manual_seed(seed)).to(dtype)
        assert choose(logits) == int((logits == logits.max()).nonzero()[0, 0])


@pytest.mark.parametrize("zero", [0, 0.0])
def test_a_temperature_of_zero_is_greedy(model, zero):
    greedy = theirs(model)
    assert [ours(model, seed=seed, do_sample=True, temperature=zero) for seed in range(4)] == [greedy] * 4


def test_greedy_keeps_what_is_not_chance(model):
    sampling = Sampling(GenerationConfig(do_sample=True, repetition_penalty=9.0, eos_token_id=STOP)).greedy()
    tokens = list(generate(model, PROMPT, max_new_tokens=10, sampling=sampling))
    assert tokens == theirs(model, repetition_penalty=9.0)


def test_what_cannot_be_honoured_is_named():
    config = GenerationConfig(num_beams=4, num_return_sequences=2, length_penalty=2.0, use_cache=False)
    assert set(Sampling(config).unhonoured()) == {"num_beams", "num_return_sequences"}
    assert Sampling(GenerationConfig(num_beams=1, num_return_sequences=1)).unhonoured() == {}


@pytest.mark.parametrize("config", [{"top_p": -1.0}, {"temperature": -1.0}, {"top_k": -3}, {"min_p": 2.0}], ids=str)
def test_a_value_that_transformers_refuses_is_one_error(model, config):
    with pytest.raises(KTransformersError, match=r"transformers refuses it: .*Correct generation_config\.json"):
        ours(model, do_sample=True, **config)


@pytest.mark.parametrize("do_sample", [False, True])
def test_logits_that_are_no_numbers_are_one_error(model, do_sample):
    choose = Chooser(Sampling(GenerationConfig(do_sample=do_sample)), model, PROMPT, 5)
    logits = torch.zeros(model.config.vocab_size)
    assert choose(logits) < len(logits)
    logits[3] = float("nan")
    with pytest.raises(KTransformersError, match="NaN"):
        choose(logits)


def test_stop_ids_are_added_to_those_of_the_config():
    assert Sampling(GenerationConfig(eos_token_id=[1, 2]), [3]).stop_ids == {1, 2, 3}
    assert Sampling(GenerationConfig(eos_token_id=0)).stop_ids == {0} and Sampling().stop_ids == set()


def test_time_that_is_up_ends_an_answer(model):
    assert len(ours(model, max_time=0.0)) == 1


def test_stop_strings_end_an_answer_and_need_a_tokenizer(model):
    from ktransformers.engine.load import load

    with pytest.raises(KTransformersError, match="stop_strings need a tokenizer"):
        ours(model, stop_strings=["x"])
    chat, tokenizer = load()
    question = [{"role": "user", "content": "What is a rule file?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    eos = chat.generation_config.eos_token_id
    config = GenerationConfig(stop_strings=["YAML list"], max_new_tokens=40, eos_token_id=eos)
    expected = chat.generate(torch.tensor([ids]), generation_config=config, tokenizer=tokenizer)[0, len(ids) :].tolist()
    got = list(generate(chat, ids, max_new_tokens=40, sampling=Sampling(config), tokenizer=tokenizer))
    assert got == expected and tokenizer.decode(got).endswith("YAML list")
