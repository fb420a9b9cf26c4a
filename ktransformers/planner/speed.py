"""How fast a plan is: bytes over bandwidth, operations over peak, attention, copies, and what a layer costs besides.

A forward pass is the sum of its parts: nothing overlaps, as layers follow one another and operators wait for each other
(but for experts split between a GPU and the CPU, whose parts run side by side). Memory-bound work takes the bandwidth
times the share of it that the kernel was measured to reach, the rest the multiplier's peak times such a share: the
shares are shares.py's, those of GPUs, which are assumed, gpu_shares.py's. What is measured about this machine's torch
is probes.py's.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from ktransformers.machine.hardware import Hardware
from ktransformers.operators.inner_ops import is_cpu
from ktransformers.planner import gpu_shares
from ktransformers.planner.probes import Probes
from ktransformers.planner.shares import FEW, TILES, TILES_FROM, peak_share, read_share
from ktransformers.planner.sizes import DENSE, Cache, Part

BF16_TYPES = frozenset({"BF16", "F8_E4M3", DENSE})
F32_TYPES = frozenset({"F16", "F32"})
"""Types by the multiplier they are computed with; all others take int8's."""

DENSE_CALL = 1.5e-4
"""Seconds that torch's product with a dense matrix takes on a CPU on top of reading it: waking threads, packing."""


@dataclass
class Pass:
    """One forward pass of `tokens` new tokens a sequence: seconds by what takes them, as (device, what)."""

    tokens: int
    batch: int
    seconds: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def rate(self) -> float:
        """Tokens per second, of all sequences together."""
        return self.tokens * self.batch / self.total if self.total else 0.0

    @property
    def bottleneck(self) -> str:
        """What takes longest, in words."""
        (device, what), seconds = max(self.seconds.items(), key=lambda item: item[1])
        return f"{what} on {device} ({100 * seconds / self.total:.0f} %)"


def forward(
    parts: Sequence[Part],
    caches: Sequence[Cache],
    devices: Mapping[int, str],
    hardware: Hardware,
    probes: Probes,
    tokens: int,
    context: int,
    batch: int = 1,
    hidden: int = 0,
    captured: bool = False,
) -> Pass:
    """Predict a pass of `tokens` tokens a sequence after `context` tokens in the cache.

    `devices` is layer -> device; `hidden` is H, for what elementwise work and copies between devices move. `captured`:
    whether the pass is one replayed graph of a GPU.
    """
    found = Pass(tokens, batch)
    many = tokens * batch
    side: dict[int | None, list[tuple[Part, float]]] = defaultdict(list)
    for part in parts:
        seconds = _part(part, hardware, many)
        if part.kind == "experts":
            side[part.layer].append((part, seconds))
        else:
            found.seconds[(part.device, _WORDS[part.kind])] += seconds
    for each in side.values():  # parts of one layer run side by side
        part, seconds = max(each, key=lambda item: item[1])
        found.seconds[(part.device, _WORDS["experts"])] += seconds
    for cache in caches:
        device = devices.get(cache.layer, "cpu")
        seconds = _attention(cache, device, hardware, probes, tokens, context, batch, captured)
        found.seconds[(device, "attention over the cache")] += seconds
    packed = {part.layer for part in parts if not is_cpu(part.device) and part.type != DENSE}
    for layer, device in devices.items():
        launches = 0.0 if is_cpu(device) else _launches(layer in packed, captured)
        seconds = launches + _besides(device, hardware, probes, many, hidden)
        found.seconds[(device, "launching and elementwise work")] += seconds
    if captured:
        found.seconds[(devices[0], "launching and elementwise work")] += gpu_shares.REPLAY
    _copies(found, parts, devices, hardware, many, hidden)
    return found


_WORDS = {
    "experts": "routed experts", "attention": "attention's matrices", "dense": "dense and shared matrices",
    "embedding": "embedding", "head": "output matrix", "rest": "norms",
}  # fmt: skip


def _gpu(device: str, hardware: Hardware) -> tuple[float, float, float]:
    """Bandwidth, bf16 rate and link of a GPU, as a copy and a large product reach them."""
    index = int(device.partition(":")[2] or 0)
    gpu = hardware.gpus[min(index, len(hardware.gpus) - 1)]
    if hardware.measured:
        return gpu.bandwidth, gpu.bf16_ops, gpu.link
    return gpu.bandwidth * gpu_shares.PUBLISHED_BANDWIDTH, gpu.bf16_ops * gpu_shares.PUBLISHED_PEAK, gpu.link


def _gpu_part(part: Part, hardware: Hardware, many: int, read: float, ops: float) -> float:
    """Seconds of a part on a GPU that reads `read` bytes for `many` tokens and takes `ops` operations."""
    bandwidth, peak, _ = _gpu(part.device, hardware)
    kind = DENSE if part.type == DENSE else "experts" if part.kind == "experts" else "matrix"
    reading = read / (bandwidth * gpu_shares.READ[kind])
    if kind == "matrix" and many > gpu_shares.MADE_FROM:
        reading += gpu_shares.MADE * part.weights / bandwidth
    launches = gpu_shares.DENSE_EXPERTS if kind == DENSE and part.kind == "experts" and part.share else 0.0
    return max(reading, ops / (peak * gpu_shares.PRODUCT[kind])) + launches


def _part(part: Part, hardware: Hardware, many: int) -> float:
    """Seconds of a part for `many` tokens: the longer of reading it and multiplying with it."""
    if part.kind == "embedding":
        many_read, ops = part.read * many, 0.0
    elif part.kind == "head":
        many_read, ops = part.read, part.ops  # only the last token's logits
    elif part.kind == "experts":
        touched = 1 - (1 - min(1.0, part.chosen * part.share / max(1, part.experts))) ** many
        whole = part.read / max(part.chosen * part.share / max(1, part.experts), 1e-12)
        many_read, ops = whole * touched, part.ops * many
    else:
        many_read, ops = part.read, part.ops * many
    if not is_cpu(part.device):
        return _gpu_part(part, hardware, 1 if part.kind == "head" else many, many_read, ops)
    cpu = hardware.cpu
    reading = many_read / (cpu.read_bandwidth * read_share(part.type))
    if part.type == DENSE and part.kind != "experts" and ops:
        reading += DENSE_CALL
    if not ops:
        return reading
    per_matrix = many * part.chosen * part.share / part.experts if part.kind == "experts" and part.experts else many
    if cpu.isa.startswith("amx") and part.type not in F32_TYPES | {DENSE}:
        kind = "bf16" if part.type in BF16_TYPES else "int8"
        peak = cpu.bf16_ops if kind == "bf16" else cpu.int8_ops
        return reading + (ops / (peak * TILES[kind]) if per_matrix >= TILES_FROM else 0.0)
    return max(reading, ops / _cpu_rate(part, hardware, per_matrix))


def _cpu_rate(part: Part, hardware: Hardware, per_matrix: float) -> float:
    """Operations per second that the CPU reaches on a part with so many tokens for each of its matrices."""
    cpu = hardware.cpu
    share = peak_share(part.type) if per_matrix >= 16 else FEW
    peak = cpu.bf16_ops if part.type in BF16_TYPES else cpu.fp32_ops if part.type in F32_TYPES else cpu.int8_ops
    peak = peak or cpu.fp32_ops
    # One token a matrix waits for memory, not for the multiplier: the shares of the bandwidth say all.
    return peak * share if per_matrix > 1 else float("inf")


def _attention(
    cache: Cache, device: str, hardware: Hardware, probes: Probes, tokens: int, context: int, batch: int, captured: bool
) -> float:
    """Scores and sums over what a layer has cached, and making the cache longer."""
    length = cache.tokens(context + tokens)
    if not cache.heads:
        return 0.0
    if is_cpu(device):
        return batch * probes.attention(cache, tokens, length)  # pages grow in place
    ops = batch * cache.attention_ops(tokens, length)
    bandwidth, peak, _ = _gpu(device, hardware)
    nbytes = cache.nbytes(context + tokens, batch)
    grown = 0 if captured else 3 * nbytes  # transformers' cache: read, written elsewhere, and that read into the caches
    product = gpu_shares.PRODUCT["attention of one token" if tokens == 1 else "attention"]
    return max(nbytes / (bandwidth * gpu_shares.READ["attention"]), ops / (peak * product)) + grown / bandwidth


def _launches(packed: bool, captured: bool) -> float:
    """Seconds that a layer on a GPU takes beside the work of its kernels."""
    if captured:
        return gpu_shares.KERNELS * gpu_shares.GAP
    return gpu_shares.KERNELS * gpu_shares.LAUNCH if packed else gpu_shares.DENSE_LAYER


def _besides(device: str, hardware: Hardware, probes: Probes, many: int, hidden: int) -> float:
    """Elementwise work on `many` tokens in a layer, and on the CPU its small operations."""
    moved = many * hidden * probes.elementwise_bytes
    if is_cpu(device):
        return probes.layer_seconds + moved / hardware.cpu.read_bandwidth
    return moved / _gpu(device, hardware)[0]


def _copies(
    found: Pass, parts: Sequence[Part], devices: Mapping[int, str], hardware: Hardware, many: int, hidden: int
) -> None:
    """Hidden states to the CPU's experts and back, and from layer to layer."""
    nbytes = 2.0 * many * hidden
    crossings = [(devices[part.layer], 2) for part in parts
                 if part.kind == "experts" and part.layer in devices
                 and is_cpu(part.device) != is_cpu(devices[part.layer])]  # fmt: skip
    order = [devices[layer] for layer in sorted(devices)]
    crossings += [(b if not is_cpu(b) else a, 1) for a, b in pairwise(order) if a != b]
    for device, times in crossings:
        if not is_cpu(device):
            link = _gpu(device, hardware)[2]
            found.seconds[(device, "copies from and to RAM")] += times * (gpu_shares.COPY + nbytes / link)

