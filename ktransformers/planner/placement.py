"""Where everything goes: layers on GPUs as far as they fit, then the experts that are used most, the rest in RAM.

In order of value for a byte: attention, shared and dense matrices serve every token, so whole layers with their cache
come first; of a layer's routed experts a token meets a few, so they get what is left. A `Placement` is devices and
expert ids; `rule_content` writes it into a rule file. How much memory and time that takes is sizes.py's and speed.py's.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from itertools import accumulate
from typing import Any

import yaml

from ktransformers.errors import ranges
from ktransformers.optimize_rules import NAMES
from ktransformers.planner import masks
from ktransformers.planner.profile import RoutingProfile

CPU = "cpu"


@dataclass(frozen=True)
class Layer:
    """What a layer takes on a GPU without its routed experts, and one of those experts there; bytes."""

    matrices: int
    cache: int
    experts: int = 0
    expert: int = 0


@dataclass(frozen=True)
class Room:
    """One device's memory for the model: `total` bytes, of which `reserved` are for work and not for weights."""

    device: str
    total: int
    reserved: int

    @property
    def free(self) -> int:
        return max(0, self.total - self.reserved)


@dataclass
class Placement:
    """`layers`: device of each layer. `gpu_experts`: layer -> ids of the experts on its GPU."""

    layers: list[str]
    gpu_experts: dict[int, list[int]] = field(default_factory=dict)

    def spans(self) -> dict[str, str]:
        """Device -> its layers as ranges, devices in the order of the layers."""
        devices = dict.fromkeys(self.layers)
        return {device: ranges([i for i, on in enumerate(self.layers) if on == device]) for device in devices}


def place_layers(layers: Sequence[Layer], rooms: Sequence[Room], first: int, last: int) -> list[str]:
    """Give each layer a GPU while there is room, in order; the rest is on the CPU.

    `first`, `last`: bytes that go where the first and the last layer go (embedding and norms; the head). Where all
    layers fit, each GPU gets its part of them *with* their experts: a GPU runs experts of its own layers only, so one
    whose layers have few would keep room that nothing can use.
    """
    if not rooms:
        return [CPU] * len(layers)
    sizes = [layer.matrices + layer.cache for layer in layers]
    sizes[0] += first
    whole = [*sizes[:-1], sizes[-1] + last]
    with_experts = [size + layer.experts * layer.expert for size, layer in zip(whole, layers, strict=True)]
    for parts in (with_experts, whole, [0] * len(layers)):
        devices = _fill(whole, parts, rooms)
        if CPU not in devices:
            return devices
    return [*_fill(sizes, [0] * len(layers), rooms)[:-1], CPU]  # the head goes with the last layer: no room elsewhere


def _fill(sizes: Sequence[int], parts: Sequence[int], rooms: Sequence[Room]) -> list[str]:
    """Layers to devices in order: each GPU takes the layers of its part, and never more than fits; the rest is CPU's.

    A GPU's part of the sum of `parts` is that of its free memory in all GPUs'; a layer on the border goes to the side
    where more of it lies. Where `parts` are all 0, GPUs are filled one after the other. `sizes`: what has to fit.
    """
    total = sum(parts)
    free = list(accumulate(room.free for room in rooms))
    ends = [total * each / max(1, free[-1]) if total else math.inf for each in free[:-1]] + [math.inf]
    devices, place, used, begin = [], 0, 0, 0
    for size, part in zip(sizes, parts, strict=True):
        while place < len(rooms) and (begin + part / 2 > ends[place] or used + size > rooms[place].free):
            place, used = place + 1, 0
        if place == len(rooms):
            break
        used, begin = used + size, begin + part
        devices.append(rooms[place].device)
    return devices + [CPU] * (len(sizes) - len(devices))


def place_experts(
    layers: Sequence[Layer],
    devices: Sequence[str],
    rooms: Sequence[Room],
    extra: Mapping[str, int],
    strategy: str,
    profile: RoutingProfile | None = None,
) -> dict[int, list[int]]:
    """Give each GPU the experts of its own layers that it still has room for, by `strategy` (masks.py).

    `extra`: device -> bytes there in addition to its layers, such as the head.
    """
    chosen: dict[int, list[int]] = {}
    for room in rooms:
        mine = [i for i, device in enumerate(devices) if device == room.device]
        routed = [i for i in mine if layers[i].experts]
        if not routed:
            continue
        used = sum(layers[i].matrices + layers[i].cache for i in mine) + extra.get(room.device, 0)
        seen = profile and RoutingProfile(profile.model_type, {i: profile.layers[i] for i in routed}, profile.tokens)
        ids = _most_experts(layers, routed, room.free - used, strategy, seen)
        chosen.update({layer: found for layer, found in ids.items() if found})
    return chosen


def _most_experts(
    layers: Sequence[Layer], routed: Sequence[int], free: int, strategy: str, profile: RoutingProfile | None
) -> dict[int, list[int]]:
    """As many experts of the layers `routed` as fit into `free` bytes; those of some layers may be larger."""
    count = layers[routed[0]].experts
    sizes = [max(1, layers[i].expert) for i in routed]

    def masked(total: int) -> dict[int, list[int]]:
        return masks.gpu_experts(strategy, routed, count, total, profile)

    def fits(total: int) -> bool:
        return sum(len(ids) * layers[layer].expert for layer, ids in masked(total).items()) <= free

    most = count * len(routed)
    least, most = (min(most, max(0, free) // each) for each in (max(sizes), min(sizes)))
    while least < most:  # `least` fits
        middle = (least + most + 1) // 2
        least, most = (middle, most) if fits(middle) else (least, middle - 1)
    return masked(least)


def packaged_file(name: str) -> str:
    """The file of the packaged rules `name`: several families may share one."""
    return f"{NAMES.get(name, name)}.yaml"


def packaged_content(name: str) -> dict[str, Any]:
    """A packaged rule file as YAML reads it: a mapping with devices and rules."""
    path = resources.files("ktransformers.optimize_rules") / packaged_file(name)
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def rule_content(
    base: Mapping[str, Any], placement: Placement, chunk: int | None = None, linear_op: str | None = None
) -> dict[str, Any]:
    """The rule file `base` with this placement. `chunk`: queries whose scores latent attention holds at a time.
    `linear_op`: the operator of linear layers, None for that of the file."""
    content = copy.deepcopy(dict(base))
    content["devices"] = placement.spans()
    for rule in content["rules"]:
        kwargs = rule["replace"].setdefault("kwargs", {})
        if rule["match"].get("trait") == "experts" and placement.gpu_experts:
            kwargs["gpu_experts"] = _compact(placement.gpu_experts)
            kwargs["gpu_device"] = "layer"
        if rule["match"].get("trait") == "mla" and chunk:
            kwargs["chunck_size"] = chunk
        if rule["match"].get("trait") == "linear" and linear_op:
            kwargs["generate_op"] = linear_op
        if not kwargs:
            del rule["replace"]["kwargs"]
    return content


def _compact(gpu_experts: Mapping[int, Sequence[int]]) -> dict[int, str]:
    return {layer: ranges(ids) for layer, ids in sorted(gpu_experts.items())}


def rule_text(content: Mapping[str, Any], header: Sequence[str] = ()) -> str:
    """The rule file as YAML, with `header` as comments above."""
    body = yaml.safe_dump(dict(content), sort_keys=False, width=120, default_flow_style=False)
    return "".join(f"# {line}\n" for line in header) + body
