"""Generation equals transformers' own, whatever the chunk size, the cache's past, or an interruption."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3MoeConfig

from ktransformers.engine.cache import PrefixCache
from ktransformers.engine.generate import Timing, generate
from ktransformers.engine.sampling import Sampling
from ktransformers.errors import KTransformersError

PROMPT = [5, 9, 2, 33, 7, 41, 12, 8, 19, 3, 27]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, eos_token_id=None,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def expected(model, ids, count):
    return model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, eos_token_id=None)[
        0, len(ids) :
    ].tolist()


def ours(model, ids, count=12, **options):
    options.setdefault("sampling", Sampling())
    return list(generate(model, ids, max_new_tokens=count, **options))


def test_greedy_tokens_equal_transformers(model):
    assert ours(model, PROMPT) == expected(model, PROMPT, 12)


@pytest.mark.parametrize("chunk_size", [1, 3, 4, 11, 100])
def test_chunked_prefill_equals_one_shot(model, chunk_size):
    assert ours(model, PROMPT, chunk_size=chunk_size) == ours(model, PROMPT)


def test_a_second_turn_computes_only_what_is_new(model):
    cache = PrefixCache()
    first = ours(model, PROMPT, 5, cache=cache)
    longer = [*PROMPT, *first, 4, 4, 2]
    timing = Timing()
    assert ours(model, longer, cache=cache, timing=timing) == ours(model, longer)
    assert timing.reused_tokens == len(PROMPT) + 4 and timing.prefill_tokens == 4


def test_a_changed_history_is_computed_again_from_where_it_differs(model):
    cache = PrefixCache()
    ours(model, PROMPT, 5, cache=cache)
    changed = [*PROMPT[:6], 60, *PROMPT[7:]]
    assert ours(model, changed, cache=cache) == ours(model, changed)
    assert ours(model, [50, 51], cache=cache) == ours(model, [50, 51])


def test_an_interrupted_pass_leaves_a_usable_cache(model, monkeypatch):
    cache = PrefixCache()
    ours(model, PROMPT, 3, cache=cache)
    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[1], "forward", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            ours(model, [*PROMPT, 1, 2, 3], cache=cache)
    assert ours(model, [*PROMPT, 1, 2, 3], cache=cache) == ours(model, [*PROMPT, 1, 2, 3])


def test_the_stop_token_ends_the_answer_even_as_the_first_one(model):
    tokens = ours(model, PROMPT)
    stop = tokens[4]
    assert ours(model, PROMPT, sampling=Sampling(stop_ids={stop})) == tokens[: tokens.index(stop)]
    assert ours(model, PROMPT, sampling=Sampling(stop_ids={tokens[0]})) == []


def test_timing_counts_what_was_computed(model):
    timing = Timing()
    ours(model, PROMPT, 6, timing=timing)
    assert (timing.prefill_tokens, timing.decode_tokens) == (len(PROMPT), 5)
    assert timing.prefill_rate > 0 and timing.decode_rate > 0


def test_sampling_follows_the_seed_and_the_generation_config(model):
    sampling = Sampling(GenerationConfig(do_sample=True, temperature=0.7, top_k=5, top_p=0.9, eos_token_id=[1, 2]))
    torch.manual_seed(1)
    one = ours(model, PROMPT, sampling=sampling)
    torch.manual_seed(1)
    assert one == ours(model, PROMPT, sampling=sampling)


@pytest.mark.parametrize("options", [{"count": 0}, {"chunk_size": 0}])
def test_sizes_that_make_no_sense_are_named(model, options):
    with pytest.raises(KTransformersError, match="expected at least 1"):
        ours(model, PROMPT, **options)
    with pytest.raises(KTransformersError, match="found no tokens"):
        ours(model, [])
