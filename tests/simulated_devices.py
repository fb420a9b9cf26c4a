"""Several GPUs that are none, with numbers and gradients: tensors of the CPU that say where they are.

Fake tensors (simulator/fake.py) have devices and no numbers, and no gradients: a node of torch's autograd asks for the
guard of the device of a leaf, which a build for the CPU lacks, and the process aborts. So here a tensor is the CPU's to
C++, and a label of Python's beside it is what `device` says. Functions of torch give results where their operands are,
and refuse to mix, as CUDA does; `to` and kin copy and change the label.

What this cannot show: labels in the backward, where torch itself takes each gradient back to where its tensor was.
"""

import contextlib

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map_only

from ktransformers.devices import pretended

CPU = torch.device("cpu")
MOVES = {"to": None, "cpu": CPU, "cuda": torch.device("cuda:0")}
MIXES = ("copy_", "__getitem__", "__setitem__", "__get__", "__set__", "backward")
"""What takes operands of several devices: copies, and indices of the CPU."""


class Placed(Tensor):
    """A tensor that is not on the CPU, it says."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def device(self):
        return self.place

    @property
    def is_cuda(self):
        return True


def place_of(tensor):
    return tensor.place if isinstance(tensor, Placed) else CPU


def placed(tensor, device):
    """`tensor`, with its graph, saying that it is on `device`."""
    if device.type != "cuda":
        return tensor.as_subclass(Tensor) if isinstance(tensor, Placed) else tensor
    made = tensor.as_subclass(Placed)
    made.place = device
    return made


def whole(device):
    """With the index that a device has where none is given."""
    device = torch.device(device)
    return torch.device("cuda:0") if device == torch.device("cuda") else device


class _Placing(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.crossed = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if name in MOVES and args and isinstance(args[0], Tensor):
            return self._moved(name, args, kwargs)
        given = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
        places = {place_of(t) for t in given if t.dim() or isinstance(t, Placed)} or {CPU}
        if name == "_has_compatible_shallow_copy_type":  # whether a module may keep its parameter as it moves
            return len(places) == 1 and func(*args)
        if len(places) > 1 and name not in MIXES:
            raise RuntimeError(f"{name}: Expected all tensors to be on the same device, found {sorted(map(str, places))}")
        place = place_of(given[0]) if given and name in MIXES else next(iter(places))
        if kwargs.get("device") is not None:
            place = whole(kwargs["device"])
            kwargs["device"] = CPU if place.type == "cuda" else place
        out = func(*args, **kwargs)
        same = {id(t) for t in given}
        return tree_map_only(Tensor, lambda t: t if id(t) in same else placed(t, place), out)

    def _moved(self, name, args, kwargs):
        x, *rest = args
        target, others = MOVES[name], []
        for value in (*rest, *([kwargs.pop("device")] if "device" in kwargs else [])):
            if isinstance(value, Tensor):
                target, others = place_of(value), [value.dtype]
            elif isinstance(value, (torch.device, str)):
                target = whole(value)
            elif isinstance(value, torch.dtype):
                others.append(value)
        kwargs.pop("non_blocking", None)
        target = place_of(x) if target is None else target
        out = Tensor.to(x, *others, **kwargs) if others or kwargs else x
        if target != place_of(x):
            self.crossed.add((str(place_of(x)), str(target)))
            out = out.clone() if out is x else out
        return x if out is x else placed(out, target)


@contextlib.contextmanager
def several_gpus(count):
    """Inside, there are cuda:0 ...; the value's `crossed` is which ways tensors went."""
    with pretended(count), _Placing() as placing:
        yield placing
