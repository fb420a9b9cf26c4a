"""A whole prefill and decode step of a model under a rule file, with fake tensors, on any machine.

It shows that every operation finds its operands on one device and that shapes and dtypes fit, from the token ids to the
logits, with the operators that would run; and it counts weights, cache, activations and copies between devices.

What it cannot see:
- numbers: whether results are right, overflow or are NaN, and what a choice of experts would be. The torch experts are
  taken to have equally many tokens each, whatever a routing profile says; code that reads a number reads 0.
- what an operation needs inside itself (workspaces of kernels, of cuBLAS and of the C library), CUDA contexts, and
  memory that an allocator holds or loses to fragmentation. torch's fused attention is taken to hold no scores.
- time, and whether copies overlap with computing; reads of single numbers (``item()``) that wait for a device.
- loading: what is in memory while weights are read, the page cache, damaged checkpoints, tensors that are missing.
- a device's own limits: its memory, the dtypes and kernels that it lacks, and links between devices that do not exist.
- the prefill operator of a rule that names another one (`prefill_op`): the one for generating runs in both passes.
"""

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from ktransformers import finish, optimize
from ktransformers.configs import meta_model
from ktransformers.errors import KTransformersError, is_whole
from ktransformers.models import ONE_BY_ONE
from ktransformers.operators.base_operator import device_of, load_weights
from ktransformers.rules.chain import ChainProblem, Plan, chain_problems, placed_by
from ktransformers.rules.plan import RulesLike, rule_label
from ktransformers.rules.plan import plan as plan_rules
from ktransformers.simulator.fake import fake_devices
from ktransformers.simulator.fake_weights import FakeWeights, Form, Size, stand_ins
from ktransformers.simulator.recorder import CACHE, WEIGHTS, Failure, Operand, PassRecord, Recorder, watch_modules

CHUNK_TOKENS = 8192
"""Tokens of context that are computed at once, as `ktransformers.engine.generate` does."""


@dataclass(frozen=True)
class Transfer:
    """Copies from one device to another in one forward pass; `nbytes` of all of them together."""

    source: str
    target: str
    count: int
    nbytes: int


@dataclass
class PassReport:
    """One forward pass: its tokens per sequence, the most bytes of activations at once per device, and the copies.

    `moves` has the copies by the module in which they happen: (module, source, target, count, bytes).
    """

    tokens: int
    peak: dict[str, int]
    transfers: list[Transfer]
    moves: list[tuple[str, str, str, int, int]] = field(repr=False)


@dataclass
class Simulation:
    """What came of it. All sizes are bytes, devices are in alphabetical order; a pass that did not run is None."""

    model: str
    gpus: int
    batch: int
    context: int
    problems: list[ChainProblem]
    weights: dict[str, int] = field(default_factory=dict)
    cache: dict[str, int] = field(default_factory=dict)
    prefill: PassReport | None = None
    decode: PassReport | None = None
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether both passes ran and nothing but warnings was found."""
        return self.decode is not None and all(problem.warning for problem in self.problems)

    def devices(self) -> list[str]:
        """Every device that holds something, GPUs last."""
        held = [self.weights, self.cache] + [p.peak for p in (self.prefill, self.decode) if p is not None]
        return sorted({device for table in held for device in table})

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, for JSON."""
        return {**asdict(self), "ok": self.ok}


def simulate(
    model_or_config: Any,
    rule: RulesLike,
    *,
    gpus: int = 8,
    tokens: int = 64,
    batch: int = 1,
    context: int = 0,
    devices: Mapping[str, str] | None = None,
    weights: Any = None,
    size: Size | None = None,
    form: Form | None = None,
    on_layer: Callable[[int, int], None] | None = None,
) -> Simulation:
    """Run a prefill of [batch, tokens] and one decode step with fake tensors.

    Args:
        model_or_config: a transformers config, or a model on the meta device, which stays as it is.
        rule: what `ktransformers.rules.load_rules` takes.
        gpus: ``cuda:0`` to ``cuda:<gpus - 1>`` exist; with 0 modules that no rule names are on the CPU.
        tokens: prompt tokens per sequence.
        batch: sequences.
        context: tokens per sequence that the cache holds before the prompt.
        devices: renames devices in the rules, such as ``{"cuda": "cpu"}``.
        weights: bound weights of a real checkpoint, for the types and bytes that packed weights have.
        size: without a checkpoint, what tells them by (name, shape, dtype), such as `planner.formats.Format.stored`;
            None: packed weights too are counted in the model's dtype.
        form: without a checkpoint, what tells their packed form on a GPU likewise, such as `Format.layout`.
        on_layer: called with (layers done, layers in all), for a progress bar.

    Returns:
        The simulation; what fails while running is among its problems.

    Raises:
        KTransformersError: sizes that are no such numbers, a model that cannot be built, rules that do not fit it.
    """
    start = time.perf_counter()
    _check_sizes(gpus=(gpus, 0), tokens=(tokens, 1), batch=(batch, 1), context=(context, 0))
    model = own_meta_model(model_or_config)
    with stand_ins():
        plan = plan_rules(model, rule, devices=devices, gpus=gpus)
        found = Simulation(type(model).__name__, gpus, batch, context, chain_problems(model, plan))
        run = Run(model, plan, found, on_layer or (lambda done, total: None))
        source = run.inject(FakeWeights(model, weights, size, form))
        with fake_devices(), run.recorder:  # once: the tensors of one fake mode are foreign to another
            run.load(source)
            run.passes(tokens)
    found.seconds = time.perf_counter() - start
    return found


def _check_sizes(**sizes: tuple[Any, int]) -> None:
    for name, (value, least) in sizes.items():
        if not is_whole(value, least):
            raise KTransformersError(f"{name}: found {value!r}, expected a whole number of at least {least}.")


def own_meta_model(model_or_config: Any) -> nn.Module:
    """A model of one's own on the meta device."""
    if isinstance(model_or_config, nn.Module):
        if any(not tensor.is_meta for tensor in model_or_config.parameters()):
            raise KTransformersError("model: found weights in memory, expected a model on the meta device or a config.")
        return copy.deepcopy(model_or_config).eval()
    return meta_model(model_or_config).eval()


class Run:
    """Loading and the two passes; what they find goes into `found`."""

    def __init__(self, model: nn.Module, plan: Plan, found: Simulation, on_layer: Callable[[int, int], None]) -> None:
        self.model, self.plan, self.found, self.on_layer = model, plan, found, on_layer
        self.recorder = Recorder()
        self.cache: Any = None
        self.done = 0

    # --- loading ---

    def inject(self, source: FakeWeights) -> FakeWeights:
        """Swap in the operators, which looks at real tensors, so not on fake devices. Returns `source`."""
        finish.keep_in_fp32(self.model)
        optimize.inject(self.model, self.plan, source)
        return source

    def load(self, source: FakeWeights) -> None:
        """Give every tensor a place, in the order of `optimize_and_load`."""
        model, devices = self.model, {name: replacement.device for name, replacement in self.plan.items()}
        source.devices = devices
        with torch.device("cpu"):
            load_weights(model, source, "", devices)
        finish.drop_replaced_tensors(model)
        finish.tie(model, source)
        _place_buffers(model, devices)
        self.recorder.mark_weights(model)
        self.found.weights = self.recorder.live(WEIGHTS)

    # --- running ---

    def passes(self, tokens: int) -> None:
        remove = watch_modules(self.model, self.recorder, self._module_done)
        try:
            with self._failures():
                tokens += self._fill(tokens)
                self.found.prefill = self._pass(tokens)
                self.found.decode = self._pass(1)
                self.found.cache = self.recorder.live(CACHE)
        finally:
            remove()

    def _fill(self, tokens: int) -> int:
        """Compute the context, unrecorded. Returns how many of its tokens the prompt's pass has to compute too."""
        context = self.found.context
        if getattr(self.model.config, "model_type", None) in ONE_BY_ONE:
            return context  # such a model takes several tokens at once only at the beginning
        for begin in range(0, context, CHUNK_TOKENS):
            self._forward(min(CHUNK_TOKENS, context - begin))
        return 0

    def _pass(self, tokens: int) -> PassReport:
        record = self.recorder.begin()
        self._forward(tokens)
        return _report(tokens, record)

    def _forward(self, tokens: int) -> None:
        ids = torch.zeros((self.found.batch, tokens), dtype=torch.int64, device=self.model.device)
        out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values
        self.recorder.mark_cache(self.cache)

    def _module_done(self, name: str) -> None:
        parts = name.split(".")
        if len(parts) > 1 and parts[-1].isdecimal() and parts[-2] == "layers":
            self.done += 1
            self.on_layer(self.done, self._layers())

    def _layers(self) -> int:
        count = sum(name.split(".")[-2:-1] == ["layers"] for name, _ in self.model.named_modules())
        chunks = -(-self.found.context // CHUNK_TOKENS)
        return count * (2 + chunks)

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """Turn what a forward raises into a problem, and say what is known of the pass that it ended."""
        try:
            yield
        except Exception as error:
            failure = self.recorder.failure
            if failure is None or not _leads_to(error, failure.error):
                running = self.recorder.running
                failure = Failure(error, running[-1] if running else "", "", ())
            self.found.problems.append(explain(failure, self.plan))
            self.found.cache = self.recorder.live(CACHE)


def _place_buffers(model: nn.Module, devices: Mapping[str, str]) -> None:
    """Place what no checkpoint holds (rotary frequencies and kin); what its numbers are does not matter."""
    for name, module in model.named_modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta and key in module._non_persistent_buffers_set:
                place = device_of(name, devices)
                module._buffers[key] = torch.empty(buffer.shape, dtype=buffer.dtype, device=place)


def _report(tokens: int, record: PassRecord) -> PassReport:
    between: dict[tuple[str, str], list[int]] = {}
    for (_, source, target), (count, nbytes) in record.moves.items():
        total = between.setdefault((source, target), [0, 0])
        total[0] += count
        total[1] += nbytes
    transfers = [Transfer(*pair, *total) for pair, total in sorted(between.items())]
    moves = [(*key, *total) for key, total in record.moves.items()]
    return PassReport(tokens, dict(sorted(record.peak.items())), transfers, moves)


# --- what went wrong ------------------------------------------------------------------------------------------------


def explain(failure: Failure, plan: Plan) -> ChainProblem:
    """A failed operation as a problem: the module, the rule that placed it, the devices or shapes, what to do."""
    weights = [operand for operand in failure.operands if operand.weight]
    module = weights[0].weight.rpartition(".")[0] if weights else failure.module
    rule = rule_label(placed_by(module, plan))
    by = _placed(module, plan)
    operation = failure.operation.removesuffix(".default")
    devices = tuple(dict.fromkeys(o.device for o in failure.operands if o.shape or o.device != "cpu"))
    if len(devices) > 1:
        given = ", ".join(f"{_call(operand, plan)} on {operand.device}" for operand in failure.operands)
        text = (
            f"{operation} got {given}; {by}. Place them on one device, or name an operator that moves its input "
            "(linear.KTransformersLinear, or models.DecoderModel for what goes between layers)"
        )
        return ChainProblem(module, rule, text, devices, operation)
    reason = (str(failure.error).strip().splitlines() or [type(failure.error).__name__])[0]
    if not isinstance(failure.error, KTransformersError) and operation:
        given = ", ".join(f"{operand.weight or 'a tensor'} {list(operand.shape)}" for operand in failure.operands)
        reason = f"{operation} of {given} raised {type(failure.error).__name__}: {reason}"
    return ChainProblem(module, rule, f"{reason} ({by})", devices, operation)


def _placed(module: str, plan: Plan) -> str:
    rule = rule_label(placed_by(module, plan))
    return f"rule {rule} placed it" if rule else "no rule names it"


def _call(operand: Operand, plan: Plan) -> str:
    """What to call a tensor: the weight that it is, or the module that made it."""
    if operand.weight:
        return operand.weight
    made = f" made in {operand.made_in} ({_placed(operand.made_in, plan)})" if operand.made_in else ""
    return f"a tensor {list(operand.shape)}{made}"


def _leads_to(error: BaseException, first: BaseException) -> bool:
    """Whether `first` is `error` or its cause."""
    seen = error
    while seen is not None:
        if seen is first:
            return True
        seen = seen.__cause__ or seen.__context__
    return False
