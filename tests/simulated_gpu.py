"""A GPU that is none: streams, graphs and host functions over tensors of the CPU, failing where CUDA would.

Inside `SimulatedStreams.running()` nothing that torch is asked for is done at once. It is noted, its results are NaN (or
the largest integers), and `wait`, or a question that needs an answer, does it: in an order drawn at random among those
that streams and joins allow, so that what nobody waited for is seen to be missing. Host functions are called by their
addresses on one thread, as a driver does. What is refused, and why:

- a new size of pinned memory, a wait, or a value asked for (`item`, `nonzero`, `bool`, `cpu`) while a graph is captured;
- work that was left aside, not joined, when a capture ends;
- a tensor that Python let go while another stream than its own still has to read it (CUDA's allocator would give its
  memory away): noted in `freed_too_early`;
- a host function that takes longer than ten seconds.

Captured tensors are NaN again before each replay, as other graphs of one pool overwrite them.
"""

import contextlib
import ctypes
import random
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

ANSWERS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "unique", "masked_select")
"""Operations of torch whose result the host needs."""

COPIES = (Tensor.cpu, Tensor.numpy, Tensor.tolist)
"""Methods of a tensor that copy to the host, of which torch's dispatcher sees nothing where that is the CPU's memory."""

HOST_SECONDS = 10


class CaptureError(RuntimeError):
    """What CUDA says: operation not permitted when stream is capturing."""


@dataclass(eq=False)
class Work:
    """Something to do once all of `after` is done. `reads`: addresses of storages."""

    run: object
    after: list["Work"]
    stream: str
    reads: frozenset[int] = frozenset()
    done: bool = False


@dataclass
class SimulatedGraph:
    streams: "SimulatedStreams"
    works: list[Work] = field(default_factory=list)
    made: list[Tensor] = field(default_factory=list)

    def replay(self) -> None:
        self.streams._replay(self)


class SimulatedStreams:
    def __init__(self, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.freed_too_early: list[str] = []
        self.pending: list[Work] = []
        self.last: dict[str, Work | None] = {"main": None, "side": None}
        self.needed: dict[str, list[Work]] = {"main": [], "side": []}  # by the stream's next work
        self.stream, self.graph = "main", None
        self.driver = ThreadPoolExecutor(1)

    # ---- what machine/streams.py asks for ----

    def pinned(self, *shape, dtype):
        if self.graph is not None:
            raise CaptureError("pinned memory while capturing")
        return torch.zeros(shape, dtype=dtype)

    def host(self, function):
        call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function.function)
        held = weakref.ref(function)

        def run():
            assert held() is not None, "a host function whose argument is gone"
            self.driver.submit(call, function_argument).result(HOST_SECONDS)

        function_argument = function.argument
        self._add(run, frozenset())

    @contextlib.contextmanager
    def aside(self):
        assert self.stream == "main"
        if self.last["main"] is not None:
            self.needed["side"].append(self.last["main"])
        self.needed["side"] += self.needed["main"]
        self.stream = "side"
        try:
            yield
        finally:
            self.stream = "main"

    def join(self):
        if self.last["side"] is not None:
            self.needed["main"].append(self.last["side"])

    def wait(self):
        if self.graph is not None:
            raise CaptureError("a wait while capturing")
        self.flush()

    def is_capturing(self):
        return self.graph is not None

    @contextlib.contextmanager
    def capture(self):
        self.flush()
        self.last, self.needed = {"main": None, "side": None}, {"main": [], "side": []}
        graph = self.graph = SimulatedGraph(self)
        try:
            yield graph
            side = self.last["side"]
            joined = {id(work) for works in (*(w.after for w in graph.works), self.needed["main"]) for work in works}
            if side is not None and id(side) not in joined:
                raise CaptureError("the side stream was not joined when capture ended")
        finally:
            self.graph = None
            self.last, self.needed = {"main": None, "side": None}, {"main": [], "side": []}

    # ---- how it works ----

    @contextlib.contextmanager
    def running(self):
        """A context in which torch's operations are this GPU's."""
        with _Copied(self), _Noted(self):
            yield

    def flush(self):
        """Do all that is pending."""
        off = torch.utils._python_dispatch._disable_current_modes()
        with torch._C.DisableTorchFunction(), off, torch.inference_mode():
            while self.pending:
                ready = [work for work in self.pending if all(w.done for w in work.after)]
                work = self.random.choice(ready)
                work.run()
                work.done = True
                self.pending.remove(work)

    def _add(self, run, reads):
        after = [w for w in (self.last[self.stream], *self.needed[self.stream]) if w is not None]
        work = Work(run, after, self.stream, reads)
        self.last[self.stream], self.needed[self.stream] = work, []
        (self.pending if self.graph is None else self.graph.works).append(work)

    def _replay(self, graph):
        assert self.graph is None and self.stream == "main"
        copies = {}
        poison = Work(lambda: [poisoned(t) for t in graph.made], [w for w in (self.last["main"],) if w], "main")
        self.pending.append(poison)
        for work in graph.works:
            after = [poison, *(copies[id(w)] for w in work.after if id(w) in copies)]
            copies[id(work)] = Work(work.run, after, work.stream)
            self.pending.append(copies[id(work)])
        end = Work(lambda: None, [poison, *copies.values()], "main")
        self.pending.append(end)
        self.last["main"] = end

    def _let_go(self, storage, stream, name):
        """The allocator gives the memory to what comes next on `stream`: that must come after all who read it."""
        before, look = set(), [w for w in (self.last[stream], *self.needed[stream]) if w is not None]
        while look:
            work = look.pop()
            if id(work) not in before:
                before.add(id(work))
                look += work.after
        if any(storage in w.reads and id(w) not in before for w in self.pending):
            self.freed_too_early.append(name)


def poisoned(tensor):
    if tensor.is_floating_point():
        return tensor.fill_(float("nan"))
    return tensor.fill_(torch.iinfo(tensor.dtype).max if tensor.dtype != torch.bool else True)


def like(tensor, device):
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)


class _Copied(TorchFunctionMode):
    def __init__(self, streams):
        super().__init__()
        self.streams = streams

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in COPIES:
            if self.streams.graph is not None:
                raise CaptureError(f"{func.__name__} while capturing")
            self.streams.flush()
        return func(*args, **(kwargs or {}))


class _Noted(TorchDispatchMode):
    def __init__(self, streams):
        super().__init__()
        self.streams = streams

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, streams, schema = kwargs or {}, self.streams, func._schema
        with self:  # without gradients torch asks for a `reshape` whole, which may be a view or a copy
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        name = schema.name.split("::")[-1]
        aliases = [a.alias_info for a in schema.arguments if a.alias_info is not None]
        if name in ANSWERS:
            if streams.graph is not None:
                raise CaptureError(f"{name} while capturing")
            streams.flush()
            return func(*args, **kwargs)
        if aliases and not any(a.is_write for a in aliases):
            return func(*args, **kwargs)  # a view
        held = tree_map_only(Tensor, lambda t: t.detach(), (args, kwargs))
        reads = frozenset(t.untyped_storage().data_ptr() for t in tree_iter(held) if isinstance(t, Tensor))
        if aliases:
            streams._add(lambda: func(*held[0], **held[1]), reads)
            return args[0] if not kwargs.get("out") is not None else kwargs["out"]
        out = self._made(func, args, kwargs)
        results = tree_map_only(Tensor, lambda t: t.detach(), out)

        def run():
            found = func(*held[0], **held[1])
            for mine, theirs in zip(tree_iter(results), tree_iter(found), strict=True):
                if isinstance(mine, Tensor):
                    mine.copy_(theirs)

        streams._add(run, reads)
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._watch(tensor, name)
        return out

    def _made(self, func, args, kwargs):
        """The results of an operation, of their shapes, holding nothing yet."""
        given, named = tree_map_only(Tensor, lambda t: like(t, "meta"), (args, kwargs))
        found = func(*given, **({**named, "device": torch.device("meta")} if "device" in named else named))
        made = tree_map_only(Tensor, lambda t: poisoned(like(t, "cpu")), found)
        if self.streams.graph is not None:
            self.streams.graph.made += [t.detach() for t in tree_iter(made) if isinstance(t, Tensor)]
        return made

    def _watch(self, tensor, name):
        streams, stream, storage = self.streams, self.streams.stream, tensor.untyped_storage().data_ptr()
        weakref.finalize(tensor, streams._let_go, storage, stream, name)
