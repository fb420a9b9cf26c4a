"""Where layers live: from the `devices:` of a rule file in the extended form to a device for every module.

`Devices` is what the file says, `place` what that means for one model and so many GPUs. Rules then name the device
``layer``. Nothing here knows rules, or whether a device exists.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ktransformers.errors import parse_ranges
from ktransformers.models.traits import TRAITS, find_layers

LAYER = "layer"
"""The device name that means: where the module's layer lives."""
AUTO = "auto"
"""The `devices:` that spreads layers evenly over the GPUs there are, or leaves them on the CPU."""
REST = "rest"
"""The layers of `devices:` that no other device has."""
FORMS = "expected layers such as '0-29', '30-', 7, [0, 4-9] or rest"


@dataclass(frozen=True)
class Devices:
    """The `devices:` of a file. `layers` is (device, spans, is_rest) each; None stands for "auto"."""

    layers: tuple[tuple[str, tuple[tuple[int, int | None], ...], bool], ...] | None = None

    def named(self) -> list[str]:
        """The devices that the file names."""
        return [device for device, _, _ in self.layers or ()]


Problems = list[tuple[Any, str]]
"""(The device of `devices:` that is at fault, None for the whole; what is wrong.)"""


def parse_devices(value: Any) -> tuple[Devices, Problems]:
    """Read `devices:`: ``auto``, or a mapping from devices to layers. Returns it and what is wrong with it.

    Where something is wrong it returns "auto", so that nothing follows from the mistake.
    """
    if value == AUTO:
        return Devices(), []
    if not isinstance(value, Mapping) or not value:
        example = "{'cuda:0': '0-29', 'cuda:1': rest}"
        return Devices(), [(None, f"found {repr(value)[:80]}, expected {AUTO!r} or a mapping such as {example}")]
    parsed: list[tuple] = []
    problems: Problems = []
    for device, text in value.items():
        if not isinstance(device, str):
            problems.append((device, f"{device!r} is no device name; expected one like 'cpu' or 'cuda:0'"))
            continue
        spans, wrong = _spans(text)
        if wrong:
            problems.append((device, f"{device}: {wrong!r} names no layers; {FORMS}"))
        parsed.append((device, tuple(spans), text == REST))
    if len(several := [device for device, _, rest in parsed if rest]) > 1:
        problems.append((several[1], f"{REST!r} is given to several devices; give it to one"))
    return Devices() if problems else Devices(tuple(parsed)), problems


def _spans(value: Any) -> tuple[list[tuple[int, int | None]], str]:
    """First and last layer of each span (None: to the end), and the first part that is none."""
    if value == REST:
        return [], ""
    spans: list[tuple[int, int | None]] = []
    for item in value if isinstance(value, Sequence) and not isinstance(value, str) else [value]:
        found, wrong = ([], str(item)) if isinstance(item, bool) else parse_ranges(str(item))
        if wrong is not None or not found:
            return [], str(item) if not wrong else wrong
        spans += found
    return spans, "" if spans else str(value)


@dataclass(frozen=True)
class Placed:
    """The devices of one model's layers: `stack` is the name of its list of layers, `devices` theirs in order."""

    stack: str
    devices: tuple[str, ...]
    last: frozenset[str]
    """Top-level names of what comes after the layers: the final norm, the head."""

    def device(self, name: str) -> str:
        """The device of module `name`: its layer's; the last layer's for what comes after them, else the first's."""
        if name.startswith(f"{self.stack}."):
            return self.devices[int(name[len(self.stack) + 1 :].partition(".")[0])]
        after = any(name == top or name.startswith(f"{top}.") for top in self.last)
        return self.devices[-1 if after else 0]

    @property
    def transfer_map(self) -> dict[int, str]:
        """{layer: device} wherever the device changes, from layer 0 on: what the decoder operator takes."""
        changes = [0, *(i for i in range(1, len(self.devices)) if self.devices[i] != self.devices[i - 1])]
        return {i: self.devices[i] for i in changes}


def place(devices: Devices, model: nn.Module, gpus: int) -> tuple[Placed | None, Problems]:
    """What `devices` means for `model` on a machine with `gpus` GPUs, and what is wrong with it."""
    found = find_layers(model)
    if found is None:
        what = f"{type(model).__name__} has no list of layers to place; use the classic form, a list of rules"
        return None, [(None, what)]
    stack, layers = found
    last = frozenset(_behind(model, stack))
    if devices.layers is None:
        return Placed(stack, _spread(len(layers), gpus), last), []
    owners, problems = _owners(devices, len(layers))
    rest = next((device for device, _, is_rest in devices.layers if is_rest), None)
    problems += _rest_problems(owners, rest)
    return Placed(stack, tuple(owner or rest or "cpu" for owner in owners), last), list(dict.fromkeys(problems))


def _spread(count: int, gpus: int) -> tuple[str, ...]:
    """The devices of `count` layers for "auto"."""
    return tuple(f"cuda:{i * gpus // count}" if gpus else "cpu" for i in range(count))


def _owners(devices: Devices, count: int) -> tuple[list[str | None], Problems]:
    """The device that names each of `count` layers, None where none does."""
    owners: list[str | None] = [None] * count
    problems: Problems = []
    for device, spans, _ in devices.layers or ():
        for first, end in spans:
            last = first if end is None else end
            if last >= count:
                what = f"{device}: layer {last} does not exist; the model has layers 0 to {count - 1}"
                problems.append((device, what))
            for i in range(first, min(count, count if end is None else end + 1)):
                if owners[i] is not None:
                    what = f"layer {i} is given to {owners[i]} and to {device}; give it to one"
                    problems.append((device, what))
                owners[i] = owners[i] or device
    return owners, problems


def _rest_problems(owners: Sequence[str | None], rest: str | None) -> Problems:
    """Layers without a device, or a device for the rest where there is none."""
    missing = [i for i, owner in enumerate(owners) if owner is None]
    if missing and rest is None:
        names = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        return [(None, f"no device has layers {names}; name them, or write a device with {REST!r}")]
    if rest is not None and not missing:
        return [(rest, f"{rest}: {REST!r} is empty, all layers are named; leave it out")]
    return []


BEFORE = ("per_layer_",)
"""How names begin of what stands after the layers but works before them: Gemma 4's embeddings for each layer."""


def _behind(model: nn.Module, stack: str) -> list[str]:
    """Names, as short as possible, of what works after the layers: the rest of the decoder, but for what all layers
    share, and what stands next to the head. What sees or hears works before them, wherever the walk meets it."""
    decoder = f"{stack.rpartition('.')[0]}.".lstrip(".")
    names: list[str] = []
    after = False
    for name, module in model.named_modules():
        if name == stack:
            after = True
        elif after and not name.startswith(f"{stack}.") and not any(name.startswith(f"{top}.") for top in names):
            before = name.rpartition(".")[2].startswith(BEFORE)
            shared = before or TRAITS["rotary"](module) or TRAITS["embedding"](module)
            if not shared and (name.startswith(decoder) or _is_next_to_the_head(model, name, stack)):
                names.append(name)
    return names


def _is_next_to_the_head(model: nn.Module, name: str, stack: str) -> bool:
    """Whether `name`, outside of the decoder, is the head or a single module like it: a cap on the logits."""
    parent = name.rpartition(".")[0]
    around = parent == "" or stack.startswith(f"{parent}.")
    heads = any(child.endswith("head") for child, _ in model.get_submodule(parent).named_children())
    return around and heads and next(model.get_submodule(name).children(), None) is None
