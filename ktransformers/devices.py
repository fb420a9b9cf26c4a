"""Device names of rule files: map them to this machine's, and say which do not exist. Starts no device."""

import contextlib
import contextvars
from collections.abc import Iterator, Mapping
from typing import Any

import torch

DEVICE_KWARGS = ("generate_device", "prefill_device", "out_device", "gpu_device", "device")
"""Rule kwargs whose value is a device name; `transfer_map` holds more of them as its values."""


_pretended: contextvars.ContextVar[int | None] = contextvars.ContextVar("gpus", default=None)


@contextlib.contextmanager
def pretended(gpus: int | None) -> Iterator[None]:
    """Inside, this file answers for a machine with `gpus` GPUs; None changes nothing."""
    token = _pretended.set(_pretended.get() if gpus is None else gpus)
    try:
        yield
    finally:
        _pretended.reset(token)


def gpu_count(devices: Mapping[str, str] | None = None) -> int:
    """How many GPUs there are, with those that `devices` renames: ``{"cuda:1": "cpu"}`` says that rules mean two."""
    if (gpus := _pretended.get()) is not None:
        return gpus
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    renamed = [name.partition(":") for name in devices or ()]
    return max([here, *(int(n) + 1 for kind, _, n in renamed if kind == "cuda" and n.isdecimal() and len(n) < 4)])


def default_device() -> str:
    """The device of modules that no rule names: upstream's ``cuda:0`` where there is a GPU, else ``cpu``."""
    return "cuda:0" if gpu_count() else "cpu"


def map_device(name: Any, devices: Mapping[str, str] | None) -> Any:
    """Return `name` as `devices` maps it: ``cuda:1`` by its own entry if there is one, else by that of ``cuda``."""
    if not devices or not isinstance(name, (str, torch.device)):
        return name
    name = str(name)
    return devices.get(name, devices.get(name.split(":")[0], name))


def map_kwargs(kwargs: Mapping[str, Any], devices: Mapping[str, str] | None) -> dict[str, Any]:
    """Copy a rule's kwargs with every device name in them mapped."""
    mapped = dict(kwargs)
    for key in DEVICE_KWARGS:
        if key in mapped:
            mapped[key] = map_device(mapped[key], devices)
    if isinstance(mapped.get("transfer_map"), Mapping):
        mapped["transfer_map"] = {k: map_device(v, devices) for k, v in mapped["transfer_map"].items()}
    return mapped


def canonical(name: Any) -> str:
    """One name for one device: ``cuda`` is ``cuda:0``, ``cpu:0`` is ``cpu``. What names no device stays as it is."""
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError, ValueError):
        return str(name)
    return "cpu" if device.type == "cpu" else f"{device.type}:{device.index or 0}"


def device_problem(name: Any) -> str:
    """Say why `name` cannot be used on this machine, or return ``""``."""
    if name == "layer":
        return "'layer' means the device of the module's layer, and no `devices:` say where layers live; add them"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError, ValueError):
        return f"{name!r} is no device name; expected one like 'cpu', 'cuda' or 'cuda:1'"
    if device.type == "cpu":
        return "" if device.index in (None, 0) else f"{name!r} does not exist; the CPU is just 'cpu'"
    if device.type == "meta":
        return "'meta' holds no data, so nothing can run there; expected one like 'cpu' or 'cuda:0'"
    if (gpus := _pretended.get()) is not None and device.type == "cuda":
        there = f"GPUs are cuda:0 to cuda:{gpus - 1}" if gpus > 1 else f"there is {'only cuda:0' if gpus else 'no GPU'}"
        return "" if (device.index or 0) < gpus else f"{name!r} does not exist on the machine planned for: {there}"
    backend = getattr(torch, device.type, None)
    count = backend.device_count() if backend is not None and hasattr(backend, "device_count") else 0
    if count == 0:
        return (
            f"{name!r} does not exist: this machine has no {device.type} device. "
            f"To run the rules without one, pass devices={{{device.type!r}: 'cpu'}}, "
            f"or --devices {device.type}=cpu to the chat"
        )
    if device.index is not None and device.index >= count:
        return f"{name!r} does not exist: this machine has {device.type}:0 to {device.type}:{count - 1}"
    return ""


def problems_of(named: Mapping[str, Any]) -> dict[str, str]:
    """Say of the devices in `named` (what it is for -> name) that cannot be used, why."""
    return {what: problem for what, device in named.items() if (problem := device_problem(device))}


def kwargs_problems(kwargs: Mapping[str, Any]) -> dict[str, str]:
    """Say of the device names in a rule's kwargs that cannot be used, why; null means "not given"."""
    named = {key: kwargs[key] for key in DEVICE_KWARGS if kwargs.get(key) is not None}
    if isinstance(kwargs.get("transfer_map"), Mapping):
        named |= {f"transfer_map[{layer}]": device for layer, device in kwargs["transfer_map"].items()}
    return problems_of(named)
