"""/kt/machine: which module runs where by which rule, memory by device, the engine's load, use of experts."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ktransformers.engine.requests import Load
from ktransformers.machine import system

PROCESS = Path("/proc/self/statm")
"""Pages of this process; the second number is those in memory."""


class Counted(Protocol):
    """How often each expert was chosen, as planner.profile.RoutingProfile counts it while the model runs."""

    layers: dict[int, list[int]]
    tokens: int


@dataclass(frozen=True)
class Machine:
    """What does not change once a model is loaded.

    Args:
        placement: the plan, as `kt rules explain` tells it, in JSON types.
        weights: device -> bytes of the weights that are on it, as they are stored.
        adapters: adapter -> device -> bytes.
        counted: grows as the model runs; None where nobody counts.
    """

    placement: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, int] = field(default_factory=dict)
    counted: Counted | None = None
    adapters: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


def report(machine: Machine, load: Load) -> dict[str, Any]:
    """The JSON of the endpoint."""
    return {
        "placement": machine.placement, "devices": _devices(machine), "load": vars(load),
        "experts": _experts(machine.counted),
    }  # fmt: skip


def _experts(counted: Counted | None) -> dict[str, Any] | None:
    if counted is None:
        return None
    layers: dict[int, Sequence[int]] = dict(sorted(counted.layers.items()))
    return {"tokens": counted.tokens, "layers": list(layers), "counts": [list(counts) for counts in layers.values()]}


# ---- memory ------------------------------------------------------------------------------------------------


def _devices(machine: Machine) -> list[dict[str, Any]]:
    """RAM first, then every GPU, and devices that only the rules know. Figures that cannot be had are null."""
    total, available = system.memory()
    found = {"cpu": _device("cpu", "RAM", total, available, _resident())}
    found |= {f"cuda:{i}": _gpu(i) for i in range(_gpus())}
    for name in machine.weights:
        found.setdefault(name, _device(name, name, None, None, None))
    return [device | _held(machine, device["device"]) for device in found.values()]


def _held(machine: Machine, device: str) -> dict[str, int]:
    adapters = sum(each.get(device, 0) for each in machine.adapters.values())
    return {"weights": machine.weights.get(device, 0), "adapters": adapters}


def _device(device: str, name: str, total: int | None, free: int | None, process: int | None) -> dict[str, Any]:
    return {"device": device, "name": name, "total": total, "free": free, "process": process}


def _resident() -> int | None:
    """Bytes of this process in RAM, pages of mapped files included."""
    try:
        import resource

        return int(PROCESS.read_text().split()[1]) * resource.getpagesize()
    except (ImportError, OSError, ValueError, IndexError):  # no Linux
        return None


def _gpus() -> int:
    """How many, where anybody has begun to use them: to look is not to start CUDA."""
    torch = sys.modules.get("torch")
    return torch.cuda.device_count() if torch is not None and torch.cuda.is_initialized() else 0


def _gpu(number: int) -> dict[str, Any]:
    import torch

    free, total = torch.cuda.mem_get_info(number)
    own = torch.cuda.memory_reserved(number)
    return _device(f"cuda:{number}", torch.cuda.get_device_name(number), total, free, own)
