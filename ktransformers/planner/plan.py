"""From a config and a machine to memory, speed and a rule file; and, where a model does not fit, to what would.

This ties the other files here together: formats and sizes say what a model takes, hardware what there is, placement
what goes where, rules.plan what a rule file then does, speed how fast that is. Nothing is loaded or printed.
"""

import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from ktransformers import env
from ktransformers.configs import meta_model, read_config, text_config
from ktransformers.errors import KTransformersError, UnsupportedError
from ktransformers.kernels import compiler
from ktransformers.machine.gpus import BEFORE_AMPERE, find_gpu
from ktransformers.machine.hardware import Hardware
from ktransformers.machine.units import GIB, format_bytes
from ktransformers.models import DEFAULT_RULES
from ktransformers.models.traits import TRAITS
from ktransformers.operators.inner_ops import is_cpu, op_problem
from ktransformers.operators.linear import LINEAR_MAP
from ktransformers.operators.paged_cache import FP8, check_kind
from ktransformers.planner import formats, masks, sizes, speed
from ktransformers.planner import probes as torch_probes
from ktransformers.planner.gpu_shares import ESTIMATE, READ
from ktransformers.planner.placement import (
    Layer,
    Placement,
    Room,
    packaged_content,
    packaged_file,
    place_experts,
    place_layers,
    rule_content,
    rule_text,
)
from ktransformers.planner.profile import RoutingProfile
from ktransformers.rules.plan import Replacement
from ktransformers.rules.plan import plan as plan_rules

BASE_RAM = 360 << 20
"""Bytes that Python, torch and transformers hold before a model is loaded, measured; and, per GPU, a CUDA context."""
BASE_GPU = 600 << 20
SCORES = 256 << 20
"""Bytes of scores that latent attention may hold at a time on a GPU; the rule's chunck_size follows."""
QUANTIZES = "KLinearMarlin"
"""The operator of linear layers that is packed on a GPU whatever the checkpoint has."""
PROMPT = 1024
"""Tokens of the prompt whose prefill is predicted, and that decoding follows, where the context is not shorter."""


@dataclass(frozen=True)
class Request:
    """What a plan is for: `context` tokens for each of `batch` sequences, prompts computed `chunk` tokens at a time.

    `cache`: how pages keep keys and values, one of `native.pages.TYPES`, or of latents on a GPU "fp8"; None is the
    model's dtype. `linear_op`: the operator of linear layers, which may quantize while loading (KLinearMarlin); None
    leaves it to their device.
    """

    context: int = 8192
    batch: int = 1
    chunk: int = 8192
    strategy: str = "uniform"
    profile: RoutingProfile | None = None
    cache: str | None = None
    linear_op: str | None = None


@dataclass
class Memory:
    """Bytes on one device. Of `weights`, `mapped` are pages of the checkpoint's file, `dense` in the model's dtype."""

    limit: int
    weights: int = 0
    mapped: int = 0
    dense: int = 0
    cache: int = 0
    work: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.work


@dataclass
class Plan:
    """The answer. Sizes are bytes; `decode` follows a prompt of PROMPT tokens, `decode_full` a full context.
    `cpu_experts`: how many routed experts of all layers are on the CPU, `dense_experts` how many are dense on GPUs."""

    model: str
    family: str
    format: str
    parameters: int
    active: int
    request: Request
    hardware: Hardware
    placement: Placement
    memory: dict[str, Memory]
    prefill: speed.Pass
    decode: speed.Pass
    decode_full: speed.Pass
    rule: str
    cpu_experts: int = 0
    dense_experts: int = 0
    problems: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        return not self.problems

    @property
    def basis(self) -> str:
        """What the speed is, where it is less than a prediction from measurements."""
        return ESTIMATE if any(device != "cpu" for device in self.placement.layers) else ""


_Sizes = tuple[dict[int | None, int], dict[int | None, tuple[int, int]], int]
"""See `Planner._sizes_on_gpu`."""


class Planner:
    """One model, ready to be planned for many machines, formats and lengths; building it takes a second or two."""

    def __init__(self, model: str, weights: str | Path | None = None, form: str | None = None):
        """`model`: what `read_config` takes; `weights`, `form`: how its weights are stored, see `formats.format_of`.

        Raises KTransformersError, WeightError where headers disagree with the config.
        """
        self.name, self.config = model, read_config(model)
        self.model: nn.Module = meta_model(self.config)
        if not any(TRAITS["experts"](module) for module in self.model.modules()):
            raise UnsupportedError(
                f"{model}: {type(self.model).__name__} has no routed experts in the form of transformers 5. "
                "kt plan places mixture-of-experts models; give one."
            )
        text = text_config(self.config)
        self.hidden, self.layers = text.hidden_size, text.num_hidden_layers
        self.tied = bool(getattr(self.model, "all_tied_weights_keys", None))
        self.base_name = DEFAULT_RULES.get(self.config.model_type, "Default")
        self.base = packaged_content(self.base_name)
        self.caches = sizes.caches(self.model)
        self.form = formats.format_of(model, self.config, self.model, weights, form)
        self._plans: dict[str, Mapping[str, Replacement]] = {}
        self._on_gpu: dict[tuple[formats.Format, str | None], _Sizes] = {}

    def probes(self, hardware: Hardware, here: bool) -> torch_probes.Probes:
        """What torch costs: measured where the processor is this machine's, assumed elsewhere."""
        return torch_probes.measure(self._is_latent()) if here else torch_probes.assumed(hardware.cpu.cores)

    # ---- one plan ----

    def plan(self, hardware: Hardware, request: Request = Request(), probes: torch_probes.Probes | None = None) -> Plan:
        """Place the model on `hardware` and predict it. What does not fit is in `problems`, ways out in `changes`."""
        probes = probes or torch_probes.assumed(hardware.cpu.cores)
        self._check(request)
        found = self.answer(hardware, request, probes)
        found.notes += self._notes(hardware, found)
        if found.problems:
            found.changes = self._changes(hardware, request, probes, found)
        elif more := self._more_gpu(hardware, request, found):
            found.notes.append(more)
        return found

    def _check(self, request: Request) -> None:
        """Raise KTransformersError for an operator, strategy, profile or type of cache that is not for this model."""
        check_kind(request.cache)
        if problem := op_problem("--linear-op", request.linear_op, "cuda", LINEAR_MAP):
            raise KTransformersError(f"{problem}.")
        routed = {i: layer.experts for i, layer in enumerate(self._layers(request, self.form)[0]) if layer.experts}
        masks.gpu_experts(request.strategy, list(routed), max(routed.values(), default=0), 0, request.profile)

    def answer(self, hardware: Hardware, request: Request, probes: torch_probes.Probes) -> Plan:
        """The plan without ways out and notes, for who asks often.

        Dense experts on a GPU beside others on the CPU, which no graph takes, must be worth it.
        """
        found = self._place(hardware, request, self.form, probes)
        if not found.cpu_experts or not found.dense_experts:
            return found
        without = self._place(hardware, request, self.form, probes, experts=False)
        return without if without.fits and without.decode.rate > found.decode.rate else found

    def _place(
        self, hardware: Hardware, request: Request, form: formats.Format, probes: torch_probes.Probes,
        experts: bool = True,
    ) -> Plan:  # fmt: skip
        form = _computed_on(hardware, form)
        rooms = [
            Room(f"cuda:{i}", gpu.memory, BASE_GPU + self._gpu_work(request) + gpu.memory // 50)
            for i, gpu in enumerate(hardware.gpus)
        ]
        layers, first, last = self._layers(request, form)
        devices = place_layers(layers, rooms, first, last) if rooms else ["cpu"] * self.layers
        extra = {devices[0]: first, devices[-1]: last} if devices[0] != devices[-1] else {devices[0]: first + last}
        chosen = place_experts(layers, devices, rooms, extra, request.strategy, request.profile) if experts else {}
        placement = Placement(devices, chosen)
        content = rule_content(self.base, placement, self._score_chunk(request) if rooms else None, request.linear_op)
        plan = self._planned(content, len(rooms))
        parts = sizes.parts(self.model, plan, form, _hits(request.profile))
        caches = sizes.caches(self.model, request.cache, plan) if request.cache else self.caches
        return self._answer(hardware, request, form, probes, placement, content, parts, caches)

    def _planned(self, content: dict[str, Any], gpus: int) -> Mapping[str, Replacement]:
        key = repr((content, gpus))
        if key not in self._plans:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the packaged file, whose author is not the one who plans
                self._plans[key] = plan_rules(self.model, content, gpus=gpus)
        return self._plans[key]

    def _layers(self, request: Request, form: formats.Format) -> tuple[list[Layer], int, int]:
        """What each layer would take on a GPU, and what goes with the first and the last."""
        key = form, request.linear_op
        if key not in self._on_gpu:
            self._on_gpu[key] = self._sizes_on_gpu(*key)
        matrices, routed, last = self._on_gpu[key]
        cached = {cache.layer: cache.nbytes(request.context, request.batch, on_gpu=True) for cache in self.caches}
        layers = [Layer(matrices[i], cached.get(i, 0), *routed.get(i, (0, 0))) for i in range(self.layers)]
        return layers, matrices[None] - last, last

    def _sizes_on_gpu(self, form: formats.Format, linear_op: str | None) -> _Sizes:
        """Bytes of each layer's matrices, how many experts it has and the bytes of one, and bytes of the head."""
        content = rule_content(self.base, Placement(["cuda:0"] * self.layers), linear_op=linear_op)
        matrices: dict[int | None, int] = defaultdict(int)
        routed: dict[int | None, tuple[int, int]] = {}
        last = 0
        for part in sizes.parts(self.model, self._planned(content, 1), form):
            if part.kind == "experts":
                routed[part.layer] = (part.experts, part.each_on_gpu)
            elif not is_cpu(part.device):
                matrices[part.layer] += part.held
                last += part.held if part.kind == "head" else 0
        return matrices, routed, last

    def _gpu_work(self, request: Request) -> int:
        tokens = min(request.chunk, request.context) * request.batch
        scores = 3 * SCORES if self._is_latent() else 0
        return sizes.work_bytes(self.model, tokens, experts=False) + sizes.kernel_bytes(self.model, tokens) + scores

    def _is_latent(self) -> bool:
        return any(cache.is_latent for cache in self.caches)

    def _score_chunk(self, request: Request) -> int | None:
        heads = max((cache.heads for cache in self.caches), default=0)
        rows = SCORES // max(1, 4 * heads * request.context * request.batch)
        return max(16, min(1000, rows)) if self._is_latent() else None

    # ---- the answer ----

    def _answer(
        self, hardware: Hardware, request: Request, form: formats.Format, probes: torch_probes.Probes,
        placement: Placement, content: dict[str, Any], parts: list[sizes.Part], caches: list[sizes.Cache],
    ) -> Plan:  # fmt: skip
        where = dict(enumerate(placement.layers))
        memory = self._memory(hardware, request, placement, parts, caches)

        graph = request.batch == 1 and self._is_graph(hardware, placement, parts)

        def predict(tokens: int, context: int) -> speed.Pass:
            return speed.forward(
                parts, caches, where, hardware, probes, tokens, context, request.batch, self.hidden,
                captured=graph and tokens == 1,
            )  # fmt: skip

        prompt = max(1, min(PROMPT, request.context - 1))
        weights = sum(part.weights for part in parts)
        sequences = "one sequence" if request.batch == 1 else f"{request.batch} sequences"
        header = [
            f"{self.name}, {form.name}: written by `kt plan` for {_machine(hardware)},",
            f"{sequences} with a context of {request.context} tokens. Made from {packaged_file(self.base_name)}.",
        ]
        found = Plan(
            self.name, self.config.model_type, form.name, weights, self._active(parts), request, hardware, placement,
            memory, predict(prompt, 0), predict(1, prompt), predict(1, max(prompt, request.context - 1)),
            rule_text(content, header), notes=list(hardware.assumptions),
            cpu_experts=sum(part.experts for part in parts if is_cpu(part.device)),
            dense_experts=sum(part.experts for part in parts if part.type == sizes.DENSE and not is_cpu(part.device)),
        )  # fmt: skip
        found.problems = _problems(memory)
        if request.cache and (kept := sum(cache.kind is not None for cache in caches)) < self.layers:
            found.notes.append(
                f"Cache: {kept} of {self.layers} layers keep {request.cache}; the others, which do not compute on "
                + ("latents of a GPU" if request.cache == FP8 else "pages of the CPU")
                + ", keep the model's dtype."
            )
        return found

    def _is_graph(self, hardware: Hardware, placement: Placement, parts: list[sizes.Part]) -> bool:
        """Whether a step of one token is a captured graph (engine/step.py): all layers on one GPU, caches of keys and
        values, of all tokens or where kernels attend of windows, and no dense experts there, whose choice torch waits
        for."""
        if len(set(placement.layers)) != 1 or is_cpu(placement.layers[0]):
            return False
        kernels = not _unpacked(hardware)
        whole = [c for c in self.caches if c.heads and (c.window is None or kernels) and not c.constant]
        dense = any(part.kind == "experts" and part.type == sizes.DENSE and not is_cpu(part.device) for part in parts)
        return len(whole) == self.layers and not dense

    def _active(self, parts: list[sizes.Part]) -> int:
        """Parameters that one token meets: of a layer's experts K, the embedding not counted."""
        experts = {part.layer: [0, 0, 0] for part in parts if part.kind == "experts"}
        rest = sum(part.weights for part in parts if part.kind not in ("experts", "embedding"))
        for part in parts:
            if part.kind == "experts":
                entry = experts[part.layer]
                entry[0], entry[1], entry[2] = entry[0] + part.weights, entry[1] + part.experts, part.chosen
        return rest + sum(weights * k // count for weights, count, k in experts.values() if count)

    def _memory(
        self, hardware: Hardware, request: Request, placement: Placement, parts: list[sizes.Part],
        caches: list[sizes.Cache],
    ) -> dict[str, Memory]:  # fmt: skip
        tokens = min(request.chunk, request.context) * request.batch
        memory = {"cpu": Memory(hardware.cpu.available, work=BASE_RAM)}
        for i, gpu in enumerate(hardware.gpus):
            memory[f"cuda:{i}"] = Memory(gpu.memory, work=0)
        for part in parts:
            device = memory["cpu" if is_cpu(part.device) else part.device]
            device.weights += part.held
            device.mapped += part.held if part.mapped else 0
            device.dense += part.held if part.type == sizes.DENSE else 0
        for cache in caches:
            device = placement.layers[cache.layer] if cache.layer < len(placement.layers) else "cpu"
            memory[device].cache += cache.nbytes(request.context, request.batch, on_gpu=not is_cpu(device))
        memory["cpu"].work += sizes.work_bytes(self.model, tokens, dense="cpu" in placement.layers)
        for name, device in memory.items():
            if name != "cpu" and device.weights:
                device.work += BASE_GPU + self._gpu_work(request)
        return memory

    # ---- what would fit ----

    def _notes(self, hardware: Hardware, found: Plan) -> list[str]:
        notes = []
        notes += _gpu_notes(found)
        positions = getattr(text_config(self.config), "max_position_embeddings", None)
        if isinstance(positions, int) and found.request.context > positions:
            notes.append(f"Context: {found.request.context} tokens, but the model is made for at most {positions}.")
        if missing := self.layers - len(self.caches):
            notes.append(f"Cache: not known for {missing} layers, which are counted without one.")
        return notes

    def _more_gpu(self, hardware: Hardware, request: Request, found: Plan) -> str:
        """How much GPU memory all layers would take, where some are on the CPU for want of it."""
        if not hardware.gpus or "cpu" not in found.placement.layers:
            return ""
        left, room = found.placement.layers.count("cpu"), BASE_GPU + self._gpu_work(request)
        form = _computed_on(hardware, self.form)
        need, quantized = self._need(request, form), self._need(replace(request, linear_op=QUANTIZES), form)
        text = (
            f"{left} of {self.layers} layers stay on the CPU: all layers need {format_bytes(need + room)} of GPU "
            f"memory ({format_bytes(room)} as work space)"
        )
        if quantized < 0.9 * need:
            text += f"; {format_bytes(quantized + room)} with --linear-op {QUANTIZES}, which quantizes while loading"
        return text + "."

    def _need(self, request: Request, form: formats.Format) -> int:
        """Bytes of all layers on GPUs, their routed experts left out."""
        layers, first, last = self._layers(request, form)
        return sum(layer.matrices + layer.cache for layer in layers) + first + last

    def _changes(self, hardware: Hardware, request: Request, probes: torch_probes.Probes, found: Plan) -> list[str]:
        """The smallest changes that make it fit, each alone, cheapest first."""
        changes = []
        over = found.memory["cpu"].total - found.memory["cpu"].limit
        freed = sum(memory.cache + memory.work for memory in found.memory.values())
        for what, value in (("chunk_size", request.chunk), ("context", request.context)):
            halved = value // 2
            while halved >= 256 and over <= freed:
                smaller = replace(request, **{_FIELDS[what]: halved})
                if self._place(hardware, smaller, self.form, probes).fits:
                    changes.append(f"--{what.replace('_', '-')} {halved} fits.")
                    break
                halved //= 2
        size = sum(m.weights for m in found.memory.values())
        for name in formats.SMALLER:
            form = formats.named_format(name, self.layers, self.tied)
            plan = self._place(hardware, request, form, probes)
            if plan.fits and sum(m.weights for m in plan.memory.values()) < size:
                changes.append(f"--format {name} fits: {format_bytes(plan.memory['cpu'].total)} of RAM.")
                break
        if over > 0:
            ram = hardware.cpu.ram + over
            changes.append(f"{format_bytes(over)} more RAM fits: {format_bytes(-(-ram // GIB) * GIB)} in total.")
        if not changes:
            changes.append("No setting makes it fit: choose a smaller model or a larger machine.")
        return changes


_FIELDS = {"chunk_size": "chunk", "context": "context"}
"""Flag of `kt plan` -> field of Request."""


def _machine(hardware: Hardware) -> str:
    counts = Counter((gpu.name, format_bytes(gpu.memory)) for gpu in hardware.gpus)
    gpus = [
        (f"{count} x " if count > 1 else "") + (name if size in name else f"{name} ({size})")
        for (name, size), count in counts.items()
    ]
    return " and ".join([*gpus, f"{format_bytes(hardware.cpu.ram)} of RAM"])


def _computed_on(hardware: Hardware, form: formats.Format) -> formats.Format:
    """`form`, without packed weights on the GPUs of a machine that cannot compute them."""
    return replace(form, layout=None) if _unpacked(hardware) else form


def _unpacked(hardware: Hardware) -> str:
    """Why weights are dense on the GPUs of a machine whatever their type, or ``""``."""
    if hardware.measured and not env.kernels():
        return "KT_KERNELS=0 wants no kernels"
    if hardware.measured and compiler.triton is None:
        return "kernels of packed ones need Triton, which cannot be imported"
    old = [gpu.name for gpu in hardware.gpus if (model := find_gpu(gpu.name)) and model.name in BEFORE_AMPERE]
    return f"Triton has no kernels for a {old[0]}" if old else ""


def _gpu_notes(found: Plan) -> list[str]:
    """What weights are on the GPUs that have some."""
    gpus = [memory for device, memory in found.memory.items() if device != "cpu" and memory.weights]
    dense, weights = sum(memory.dense for memory in gpus), sum(memory.weights for memory in gpus)
    if not gpus:
        return []
    if dense == weights:
        why = f": {reason}" if (reason := _unpacked(found.hardware)) else ""
        return [f"GPU: the {format_bytes(dense)} of weights there are dense, in the model's dtype{why}."]
    return [
        f"GPU: {format_bytes(weights - dense)} of weights stay packed there, {format_bytes(dense)} are dense. Packed "
        f"matrices are taken to be read with {100 * READ['matrix']:.0f} % of its bandwidth, experts with "
        f"{100 * READ['experts']:.0f} %: not measured on a GPU."
    ]


def _problems(memory: Mapping[str, Memory]) -> list[str]:
    return [
        f"{'RAM' if device == 'cpu' else device}: {format_bytes(found.total)} needed (weights "
        f"{format_bytes(found.weights)}, cache {format_bytes(found.cache)}, work {format_bytes(found.work)}), "
        f"{format_bytes(found.limit)} available."
        for device, found in memory.items()
        if found.total > found.limit
    ]


def _hits(profile: RoutingProfile | None) -> dict[int, dict[int, float]] | None:
    if profile is None:
        return None
    return {
        layer: {e: n / sum(counts) for e, n in enumerate(counts)}
        for layer, counts in profile.layers.items()
        if any(counts)
    }


