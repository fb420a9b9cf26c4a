"""A cache that is used again gives what a fresh one gives, whatever its layers are and wherever a pass was interrupted."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache, cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ktransformers.engine.cache import PrefixCache, _crops_all_of_itself
from ktransformers.engine.generate import Timing, generate
from ktransformers.engine.sampling import Sampling
from tests import families
from tests.tiny import random_ids, randomize

KINDS = {  # one family for each kind of cache layer
    "qwen3_moe": {},
    "gpt_oss": {"sliding_window": 16},
    "deepseek_v32": {},
    "deepseek_v4": {},
    "qwen3_next": {},
    "lfm2_moe": {},
    "jamba": {},
    "minimax": {},
    "granitemoehybrid": {},
}
TURNS = [(40, 30, 20), (40, 39, 5), (10, 8, 30), (60, 20, 10), (17, 16, 3), (40, 40, 1), (12, 12, 5)]
"""Tokens of a first prompt, how many a second one shares with it, and how many follow those."""


@pytest.fixture(scope="module")
def models():
    made = {}

    def make(kind):
        if kind not in made:
            torch.manual_seed(0)
            config = families.config_of(kind)
            for name, value in KINDS[kind].items():
                setattr(config, name, value)
            made[kind] = randomize(AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval())
        return made[kind]

    return make


def tokens(model, ids, count=5, **options):
    return list(generate(model, ids, max_new_tokens=count, sampling=Sampling(), **options))


def ids(count, seed):
    return random_ids(1, count, seed=seed)[0].tolist()


@pytest.mark.parametrize("turn", TURNS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_second_turn_equals_a_fresh_start(models, kind, turn):
    model, (first, shared, more) = models(kind), turn
    prompt, cache = ids(first, 3), PrefixCache()
    answer = tokens(model, prompt, cache=cache)
    for second in (prompt[:shared] + ids(more, 4), prompt + answer + ids(more, 5), prompt + answer[:-1] + ids(1, 6)):
        assert tokens(model, second, cache=cache) == tokens(model, second)


@pytest.mark.parametrize("at", [(0, 1), (1, 1), (1, 3), (2, 1)], ids=["prefill", "a later chunk", "decode", "a second turn"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_pass_does_not_show_later(models, kind, at, monkeypatch):
    """Ctrl-C between two layers, in the pass `at[1]` of call `at[0]`."""
    model, cache = models(kind), PrefixCache()
    prompt = ids(24, 3)
    if at[0] == 2:
        prompt += tokens(model, prompt, cache=cache) + ids(20, 4)
    last, passes = model.model.layers[-1], []

    def forward(*args, **kwargs):
        passes.append(1)
        if len(passes) > at[1]:
            raise KeyboardInterrupt
        return type(last).forward(last, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(last, "forward", forward)
        with pytest.raises(KeyboardInterrupt):
            tokens(model, prompt, cache=cache, chunk_size=100 if at[0] == 0 else 20, count=8)
    for second in ([*prompt, 7, 9], [*prompt[:20], 3, 4]):
        assert tokens(model, second, cache=cache) == tokens(model, second)


def test_an_answer_is_taken_back_from_a_window_that_moved_over_it(models):
    """What gpt-oss does in each turn: its reasoning is not in the next prompt. The prompt is not computed again."""
    cache, timing, prompt = PrefixCache(), Timing(), ids(60, 3)
    tokens(models("gpt_oss"), prompt, 30, cache=cache)
    second = prompt + ids(9, 4)
    assert tokens(models("gpt_oss"), second, cache=cache, timing=timing) == tokens(models("gpt_oss"), second)
    assert timing.reused_tokens == 60
    sliding = [layer for layer in cache.cache.layers if isinstance(layer, DynamicSlidingWindowLayer)]
    assert sliding and all(layer.keys.shape[-2] < 16 + 5 for layer in sliding)  # the prefill of the turn recorded nothing


def test_a_layer_that_cannot_go_back_leaves_all_others_as_they_are(models):
    """All or nothing: a full-attention layer before a sliding one is not cut when the sliding one cannot be."""
    cache, prompt = PrefixCache(), ids(60, 3)
    tokens(models("gpt_oss"), prompt, cache=cache)
    before = [layer.get_seq_length() for layer in cache.cache.layers]
    assert not cache._shorten(30)
    assert [layer.get_seq_length() for layer in cache.cache.layers] == before


@pytest.mark.parametrize("kind", ["qwen3_next", "lfm2_moe", "minimax", "deepseek_v4", "gpt_oss"])
def test_a_prompt_that_goes_on_is_not_computed_again(models, kind):
    cache, timing, prompt = PrefixCache(), Timing(), ids(40, 3)
    answer = tokens(models(kind), prompt, cache=cache)
    tokens(models(kind), prompt + answer + ids(4, 4), cache=cache, timing=timing)
    assert timing.reused_tokens == 40 + 4  # the last token of an answer is not in the cache


def test_an_interrupted_decode_does_not_cost_the_prompt(models, monkeypatch):
    for kind in ("qwen3_moe", "gpt_oss"):
        cache, timing, prompt = PrefixCache(), Timing(), ids(40, 3)
        stream = generate(models(kind), prompt, max_new_tokens=9, sampling=Sampling(), cache=cache)
        next(stream), next(stream)
        with monkeypatch.context() as patch:
            patch.setattr(models(kind).model.layers[1], "forward", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                next(stream)
        tokens(models(kind), [*prompt, 1, 2, 3], cache=cache, timing=timing)
        assert timing.reused_tokens == 40


def test_an_update_that_was_cut_in_two_is_noticed(models):
    """Keys of a token without its values: what Ctrl-C between two lines of transformers leaves."""
    cache, prompt = PrefixCache(), ids(20, 3)
    answer = tokens(models("qwen3_moe"), prompt, cache=cache)
    cache._torn = True
    layer = cache.cache.layers[0]
    layer.keys = torch.cat([layer.keys, layer.keys[:, :, -1:]], dim=-2)
    second = prompt + answer
    assert tokens(models("qwen3_moe"), second, cache=cache) == tokens(models("qwen3_moe"), second)


class Counting(DynamicLayer):
    """A layer with a state of its own that the inherited `crop` does not know."""

    def __init__(self):
        super().__init__()
        self.updates = 0

    def update(self, *args, **kwargs):
        self.updates += 1
        return super().update(*args, **kwargs)


def caches(config):
    own = DynamicCache(config=config)
    own.layers = [Counting() for _ in range(config.num_hidden_layers)]
    return {"static": StaticCache(config, max_cache_len=80), "own layers": own}


@pytest.mark.parametrize("name", ["static", "own layers"])
def test_a_cache_of_another_class_is_used_on_or_computed_again(models, name):
    model, prompt = models("qwen3_moe"), ids(30, 3)
    for shared in (30, 12):
        cache, timing = PrefixCache(), Timing()
        cache.cache = caches(model.config)[name]
        answer = tokens(model, prompt, cache=cache)
        second = (prompt + answer if shared == 30 else prompt[:shared]) + ids(5, 4)
        assert tokens(model, second, cache=cache, timing=timing) == tokens(model, second)
        assert timing.reused_tokens == (34 if shared == 30 else 0)


def test_quantized_layers_are_not_cropped():
    """Their `crop` is inherited and would cut the part that is not quantized only."""
    kinds = [kind for kind in vars(cache_utils).values() if isinstance(kind, type) and hasattr(kind, "crop")]
    refused = {kind.__name__ for kind in kinds if issubclass(kind, DynamicLayer) and not _crops_all_of_itself(kind)}
    assert {"QuantizedLayer", "QuantoQuantizedLayer", "HQQQuantizedLayer", "Fp8QuantizedLayer"} <= refused
    assert _crops_all_of_itself(DynamicLayer) and _crops_all_of_itself(DynamicSlidingWindowLayer)
