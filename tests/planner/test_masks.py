"""Placement strategies: which experts go to the GPU, and what is said of counts and profiles that do not fit."""

import pytest

from ktransformers.errors import KTransformersError
from ktransformers.planner.masks import STRATEGIES, gpu_experts
from ktransformers.planner.profile import RoutingProfile

LAYERS, E = [3, 4, 5], 8
PROFILE = RoutingProfile("x", {3: [0, 9, 0, 0, 0, 0, 0, 1], 4: [5] * 8, 5: [0, 0, 7, 6, 0, 0, 0, 0]}, tokens=40)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("count", [0, 1, 2, 7, 12, 23, 24])
def test_as_many_as_asked_for_each_once(strategy, count):
    masks = gpu_experts(strategy, LAYERS, E, count, PROFILE)
    assert list(masks) == LAYERS and sum(map(len, masks.values())) == count
    assert all(ids == sorted(set(ids)) and set(ids) <= set(range(E)) for ids in masks.values())


def test_uniform_gives_every_layer_the_same_and_the_rest_to_the_first():
    assert gpu_experts("uniform", LAYERS, E, 7) == {3: [0, 1, 2], 4: [0, 1], 5: [0, 1]}
    assert gpu_experts("uniform", [5, 3, 4], E, 1) == {3: [0], 4: [], 5: []}


def test_frequency_takes_the_most_used_of_all_layers():
    assert gpu_experts("frequency", LAYERS, E, 5, PROFILE) == {3: [1], 4: [0, 1], 5: [2, 3]}
    best = PROFILE.hit_rate(gpu_experts("frequency", LAYERS, E, 9, PROFILE))
    assert all(best >= PROFILE.hit_rate(gpu_experts(other, LAYERS, E, 9)) for other in STRATEGIES if other != "frequency")


def test_front_loading_fills_whole_layers_from_the_first():
    assert gpu_experts("front-loading", LAYERS, E, 11) == {3: list(range(8)), 4: [0, 1, 2], 5: []}


def test_random_is_the_same_for_a_seed_and_another_for_another():
    masks = [gpu_experts("random", LAYERS, E, 9, seed=seed) for seed in (42, 42, 7)]
    assert masks[0] == masks[1] == gpu_experts("random", LAYERS, E, 9) != masks[2]


BAD = [
    (("frequencies", LAYERS, E, 3), {}, "did you mean 'frequency'"),
    (("frequency", LAYERS, E, 3), {}, "found no routing profile. Make one with `kt profile"),
    (("uniform", LAYERS, E, 25), {}, r"found 25, expected 0 to 24 \(3 layers of 8\)"),
    (("uniform", LAYERS, E, -1), {}, "found -1"),
    (("uniform", LAYERS, E, 2.5), {}, "found 2.5"),
    (("uniform", [], E, 1), {}, "expected 0 to 0"),
    (("frequency", [3, 4], E, 3), {"profile": PROFILE}, "found layers 3-5, expected 3-4"),
    (("frequency", LAYERS, 16, 3), {"profile": PROFILE}, "found 8 experts per layer, expected 16"),
    (("frequency", [0], 2, 1), {"profile": RoutingProfile("x", {0: [0, 0]})}, "found no choice at all"),
]


@pytest.mark.parametrize(("arguments", "more", "message"), BAD)
def test_what_cannot_be_placed_is_said(arguments, more, message):
    with pytest.raises(KTransformersError, match=message):
        gpu_experts(*arguments, **more)
