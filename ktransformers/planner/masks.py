"""Which experts go to the GPU when not all fit: upstream's placement strategies, as pure functions of counts.

How many fit is the planner's question, where they run the rules' (`gpu_experts`). Nothing here touches a model.
"""

import random
from collections.abc import Sequence

from ktransformers.errors import KTransformersError, did_you_mean
from ktransformers.planner.profile import RoutingProfile

STRATEGIES = ("uniform", "frequency", "front-loading", "random")


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
    order, total = sorted(set(layers)), len(set(layers)) * n_experts
    if strategy not in STRATEGIES:
        raise KTransformersError(
            f"strategy: {strategy!r} unknown{did_you_mean(str(strategy), STRATEGIES)}; known: {', '.join(STRATEGIES)}."
        )
    if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= total:
        raise KTransformersError(
            f"experts on the GPU: found {count!r}, expected 0 to {total} ({len(order)} layers of {n_experts})."
        )
    if profile is not None:
        profile.require(order, n_experts)
    if strategy == "uniform":
        each, more = divmod(count, len(order)) if order else (0, 0)
        return {layer: list(range(each + (place < more))) for place, layer in enumerate(order)}
    pairs = [(layer, e) for layer in order for e in range(n_experts)]
    if strategy == "random":
        pairs = random.Random(seed).sample(pairs, count)
    elif strategy == "frequency":
        if profile is None:
            raise KTransformersError(
                "strategy 'frequency': found no routing profile. Make one with `kt profile MODEL --prompts FILE`, or "
                "choose another strategy."
            )
        pairs.sort(key=lambda pair: -profile.layers[pair[0]][pair[1]])  # stable, so equals stay in order
    masks: dict[int, list[int]] = {layer: [] for layer in order}
    for layer, e in sorted(pairs[:count]):
        masks[layer].append(e)
    return masks
