"""What happens while a model runs on fake devices: bytes alive, copies between devices, and where it went wrong.

It watches and changes nothing. A storage counts from the operation that makes it until its last tensor is gone, with
its full size, whoever views it. What an operation needs inside itself is not seen.
"""

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

LARGE = 32 << 20
"""Bytes; glibc's DEFAULT_MMAP_THRESHOLD_MAX, up to which its threshold grows with what is freed."""

WEIGHTS, CACHE, ACTIVATIONS = "weights", "cache", "activations"


@dataclass
class _Storage:
    device: str
    nbytes: int
    kind: str = ACTIVATIONS
    name: str = ""
    """Of the weight in it, where it has one."""
    made_in: str = ""
    """The module that ran when it was made."""


@dataclass(frozen=True)
class Operand:
    """A tensor that an operation was given; `weight` is its name if it is one, `made_in` the module that made it."""

    device: str
    shape: tuple[int, ...]
    weight: str = ""
    made_in: str = ""


@dataclass(frozen=True)
class Failure:
    """An operation that raised, and the innermost module that was running."""

    error: BaseException
    module: str
    operation: str
    operands: tuple[Operand, ...]


@dataclass
class PassRecord:
    """One pass. `peak`: device -> most bytes of activations alive at once; `apart`: (device, whether blocks are larger
    than LARGE) -> the same of these alone. `moves`: (module, source, target) -> [copies, bytes]. `workspace`: most
    bytes that an operation needs inside itself, where `Recorder.workspace` knows."""

    peak: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    moves: dict[tuple[str, str, str], list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0]))
    workspace: int = 0
    apart: dict[tuple[str, bool], int] = field(default_factory=lambda: defaultdict(int))


class Recorder(TorchDispatchMode):
    """Enter it inside `fake_devices`, around loading and running."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[str] = []
        """Names of the modules whose forward is under way, the innermost last."""
        self.failure: Failure | None = None
        self.current = PassRecord()
        self.workspace: Callable[[Any, tuple], int] = lambda operation, args: 0
        self._storages: dict[int, _Storage] = {}
        self._live: dict[tuple[str, str], int] = defaultdict(int)
        self._apart: dict[tuple[str, bool], int] = defaultdict(int)

    # --- what is asked ---

    def live(self, kind: str) -> dict[str, int]:
        """Device -> bytes of that kind alive now, devices without any left out."""
        return {device: nbytes for (device, of), nbytes in sorted(self._live.items()) if of == kind and nbytes}

    def begin(self) -> PassRecord:
        """Start recording a new pass and return it."""
        self.current = PassRecord()
        for device, nbytes in self.live(ACTIVATIONS).items():
            self.current.peak[device] = nbytes
        self.current.apart.update(self._apart)
        return self.current

    def mark_weights(self, model: nn.Module) -> None:
        """Whatever is alive now is weights, and what belongs to a module of `model` has its name."""
        for storage in self._storages.values():
            self._set_kind(storage, WEIGHTS)
        for named in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
            for name, tensor in named:
                if (storage := self._known(tensor)) is not None and not storage.name:
                    storage.name = name

    def mark_cache(self, cache: Any) -> None:
        """The tensors in `cache`, at any depth, are cache from now on."""
        for tensor in _tensors_in(cache, set()):
            storage = self._known(tensor)
            if storage is not None and storage.kind == ACTIVATIONS:
                self._set_kind(storage, CACHE)

    # --- what is seen ---

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Mapping | None = None) -> Any:
        kwargs = kwargs or {}
        try:
            out = func(*args, **kwargs)
        except Exception as error:
            self._fail(error, func, (args, kwargs))
            raise
        for tensor in tree_leaves(out):
            if isinstance(tensor, FakeTensor):
                self._see(tensor)
        self.current.workspace = max(self.current.workspace, self.workspace(func, args))
        if func is aten._to_copy.default and isinstance(out, FakeTensor):
            self._move(args[0], out, out.nbytes)
        elif func is aten.copy_.default:
            self._move(args[1], args[0], args[1].nbytes)
        return out

    def seen(self, tensor: Tensor) -> Tensor:
        """`tensor`, which was made where this mode does not look: inside a tensor that computes for itself."""
        self._see(tensor)
        return tensor

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        seen = self._storages[key] = _Storage(str(tensor.device), storage.nbytes(), made_in=self._module())
        weakref.finalize(storage, self._forget, key, seen).atexit = False
        self._count(seen, seen.nbytes)

    def _forget(self, key: int, seen: _Storage) -> None:
        if self._storages.get(key) is seen:
            del self._storages[key]
            self._count(seen, -seen.nbytes)

    def _set_kind(self, storage: _Storage, kind: str) -> None:
        self._count(storage, -storage.nbytes)
        storage.kind = kind
        self._count(storage, storage.nbytes)

    def _count(self, storage: _Storage, nbytes: int) -> None:
        self._live[storage.device, storage.kind] += nbytes
        if storage.kind != ACTIVATIONS:
            return
        part = storage.device, storage.nbytes > LARGE
        self._apart[part] += nbytes
        if nbytes > 0:
            live, now = self._live[storage.device, ACTIVATIONS], self.current
            now.peak[storage.device] = max(now.peak[storage.device], live)
            now.apart[part] = max(now.apart[part], self._apart[part])

    def _known(self, tensor: Tensor) -> _Storage | None:
        return self._storages.get(tensor.untyped_storage()._cdata) if isinstance(tensor, FakeTensor) else None

    def _move(self, source: Any, target: Any, nbytes: int) -> None:
        if not isinstance(source, FakeTensor) or source.device == target.device or not nbytes:
            return
        counted = self.current.moves[self._module(), str(source.device), str(target.device)]
        counted[0] += 1
        counted[1] += nbytes

    def _fail(self, error: BaseException, func: Any, arguments: Any) -> None:
        operands = tuple(self._operand(t) for t in tree_leaves(arguments) if isinstance(t, FakeTensor))
        self.failure = Failure(error, self._module(), str(func), operands)

    def _operand(self, tensor: Tensor) -> Operand:
        storage = self._known(tensor)
        known = (storage.name, storage.made_in) if storage is not None else ()
        return Operand(str(tensor.device), tuple(tensor.shape), *known)

    def _module(self) -> str:
        return self.running[-1] if self.running else ""


def _tensors_in(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor in an object: in its attributes, lists, tuples and dicts, but not in its modules."""
    if isinstance(value, Tensor):
        yield value
        return
    if id(value) in seen or isinstance(value, (str, bytes, int, float, type, nn.Module, torch.dtype, torch.device)):
        return
    seen.add(id(value))
    if isinstance(value, Mapping):
        parts = list(value.values())
    elif isinstance(value, (list, tuple, set)):
        parts = list(value)
    elif type(value).__module__.startswith(("transformers.cache_utils", "transformers.models.", "ktransformers.")):
        parts = list(vars(value).values()) if hasattr(value, "__dict__") else []
    else:
        return
    for part in parts:
        yield from _tensors_in(part, seen)


def watch_modules(model: nn.Module, recorder: Recorder, on_done: Callable[[str], None]) -> Callable[[], None]:
    """Tell `recorder` which module runs and what is cache; `on_done` is called with the name of each that finished.

    A module's own hooks run inside it, so copies that they make are its copies. Returns what removes the hooks.
    """
    hooks = []

    def enter(name: str) -> Callable:
        return lambda module, args, kwargs: recorder.running.append(name)

    def leave(module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        name = recorder.running.pop()
        cache = kwargs.get("past_key_values")
        if cache is None:
            cache = getattr(out, "past_key_values", None)
        if cache is not None:
            recorder.mark_cache(cache)
        on_done(name)

    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(enter(name), prepend=True, with_kwargs=True))
        hooks.append(module.register_forward_hook(leave, with_kwargs=True))

    def remove() -> None:
        for hook in hooks:
            hook.remove()

    return remove
