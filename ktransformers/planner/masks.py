"""Which experts go to the GPU when not all fit: upstream's placement strategies, as pure functions of counts.

How many fit is the planner's question, where they run the rules' (`gpu_experts`). Nothing here touches a model.
"""

import random
from collections.abc import Callable, Sequence

from ktransformers.errors import KTransformersError, did_you_mean, is_whole
from ktransformers.planner.profile import RoutingProfile

Pairs = list[tuple[int, int]]
"""(layer, expert), by layer and then by expert."""


def gpu_experts(
    strategy: str,
    layers: Sequence[int],
    n_experts: int,
    count: int,
    profile: RoutingProfile | None = None,
    seed: int = 42,
) -> dict[int, list[int]]:
    """Choose `count` experts of a model with `n_experts` in each of `layers`: layer -> ids, ascending, maybe none.

    "uniform": the same number in every layer, one more in the first ones where it does not come out even; the first
    ids. "frequency": those most used in `profile`, whatever their layer; of equals the first. "front-loading": whole
    layers from the first on. "random": any, by `seed`.

    Raises KTransformersError for an unknown strategy, a count that there are not as many experts for, "frequency"
    without a profile, and a profile of another model.
    """
    order = sorted(set(layers))
    _check(strategy, order, n_experts, count, profile)
    pairs = [(layer, e) for layer in order for e in range(n_experts)]
    masks: dict[int, list[int]] = {layer: [] for layer in order}
    for layer, e in sorted(_STRATEGIES[strategy](pairs, count, profile, seed)):
        masks[layer].append(e)
    return masks


def _check(strategy: str, order: list[int], n_experts: int, count: int, profile: RoutingProfile | None) -> None:
    if strategy not in STRATEGIES:
        raise KTransformersError(
            f"strategy: {strategy!r} unknown{did_you_mean(str(strategy), STRATEGIES)}; known: {', '.join(STRATEGIES)}."
        )
    if not is_whole(count, 0, len(order) * n_experts):
        found = f"expected 0 to {len(order) * n_experts} ({len(order)} layers of {n_experts})"
        raise KTransformersError(f"experts on the GPU: found {count!r}, {found}.")
    if profile is not None:
        profile.require(order, n_experts)
    elif strategy == "frequency":
        raise KTransformersError(
            "strategy 'frequency': found no routing profile. Make one with `kt profile MODEL --prompts FILE`, or "
            "choose another strategy."
        )


def _uniform(pairs: Pairs, count: int, profile: RoutingProfile | None, seed: int) -> Pairs:
    return sorted(pairs, key=lambda pair: (pair[1], pair[0]))[:count]  # the first of every layer, then the second ...


def _frequency(pairs: Pairs, count: int, profile: RoutingProfile | None, seed: int) -> Pairs:
    return sorted(pairs, key=lambda pair: -profile.layers[pair[0]][pair[1]])[:count]  # stable: equals stay in order


def _front_loading(pairs: Pairs, count: int, profile: RoutingProfile | None, seed: int) -> Pairs:
    return pairs[:count]


def _random(pairs: Pairs, count: int, profile: RoutingProfile | None, seed: int) -> Pairs:
    return random.Random(seed).sample(pairs, count)


_STRATEGIES: dict[str, Callable[[Pairs, int, RoutingProfile | None, int], Pairs]] = {
    "uniform": _uniform,
    "frequency": _frequency,
    "front-loading": _front_loading,
    "random": _random,
}
STRATEGIES = tuple(_STRATEGIES)
