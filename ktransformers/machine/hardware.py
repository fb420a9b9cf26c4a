"""The machine that a plan is for: measured here, or described in a few words.

`measure()` probes this machine for about two seconds. `describe()` reads `--gpu 24GiB`, `--gpu 2x4090` and
`--ram 384GiB@200GB/s`, and says in a sentence each what it had to assume. Sizes are bytes, bandwidths bytes per second,
rates operations per second (two per multiply-add). What a model needs of all this is not known here.
"""

import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log
from typing import Any

from ktransformers.errors import KTransformersError, is_whole
from ktransformers.machine import system
from ktransformers.machine.gpus import GPU_MODELS, GpuModel, closest_names, find_gpu, typical_gpu
from ktransformers.machine.units import GIB, UNITS, format_bytes, format_rate, parse_bytes, parse_rate

Progress = Callable[[str], Any]
"""Called with a few words on what is being measured."""


@dataclass(frozen=True)
class Cpu:
    """Processor and RAM.

    Attributes:
        name: the processor's own, or what is assumed.
        cores: threads that the C library would use: one per core, within affinity and cgroup.
        ram, available: bytes in all, and free for a model; both within the cgroup's limit.
        read_bandwidth: bytes per second that all threads together read from RAM.
        int8_ops, bf16_ops, fp32_ops: operations per second of all threads; 0.0 where the instruction set has none.
        isa: instruction set of the C library (env.ISAS).
        numa_nodes: nodes that have processors.
    """

    name: str
    cores: int
    ram: int
    available: int
    read_bandwidth: float
    int8_ops: float
    bf16_ops: float
    fp32_ops: float
    isa: str
    numa_nodes: int


@dataclass(frozen=True)
class Gpu:
    """One GPU: `memory` bytes in all; `bandwidth` of that memory; `bf16_ops` dense (fp16 where there is no bf16);
    `link` from pinned RAM to the GPU. What a program reaches when measured, the published peak when not."""

    name: str
    memory: int
    bandwidth: float
    bf16_ops: float
    link: float


@dataclass(frozen=True)
class Hardware:
    """A machine. `measured`: whether every figure was measured here. `assumptions`: sentences, each with its remedy."""

    cpu: Cpu
    gpus: tuple[Gpu, ...] = ()
    measured: bool = False
    assumptions: tuple[str, ...] = ()


# ---- measured ----------------------------------------------------------------------------------------------

READS, PEAKS = 15, 9  # slices; their median counts, since shared machines change from moment to moment
SLICE = 0.02  # seconds of a peak's slice
LEAST_PROBE, MOST_PROBE = 256 << 20, 2 << 30  # bytes of the buffer that is read
COPY = 256 << 20  # bytes copied on a GPU and to it
MATRIX = 4096  # rows and columns of the matrices multiplied on a GPU


def measure(progress: Progress | None = None) -> Hardware:
    """This machine: about two seconds, more on the first use of a GPU.

    Raises NativeError when the C library is not built, KTransformersError for a bad KT_* variable.
    """
    cpu = measure_cpu(progress)
    gpus, notes = measure_gpus(progress)
    return Hardware(cpu, gpus, measured=not notes, assumptions=notes)


def measure_cpu(progress: Progress | None = None) -> Cpu:
    """Processor and RAM of this machine. Raises as `measure` does."""
    from ktransformers import native

    say = progress or _quiet
    total, available = system.memory()
    say("reading memory")
    bandwidth = _read_bandwidth(available)
    say("multiplying")
    ops = {kind: _peak(kind) for kind in ("int8", "bf16", "f32")}
    return Cpu(
        system.cpu_name(), native.default_threads(), total, available, bandwidth,
        ops["int8"], ops["bf16"], ops["f32"], native.isa(), system.numa_nodes(),
    )  # fmt: skip


def _quiet(_: str) -> None:
    return None


def _read_bandwidth(available: int) -> float:
    """Bytes per second: the median of several reads of a buffer several times the last-level cache."""
    import torch

    from ktransformers import native

    size = min(max(LEAST_PROBE, 4 * system.last_level_cache()), MOST_PROBE, max(available // 8, 1 << 20))
    data = torch.empty(size, dtype=torch.uint8).fill_(1)  # written, so that its pages exist
    native.bench_read(data)
    return size / statistics.median(_seconds(lambda: native.bench_read(data)) for _ in range(READS))


def _peak(kind: str) -> float:
    """Operations per second of register-only multiply-adds."""
    from ktransformers import native

    rates, iterations = [], 100_000
    for _ in range(PEAKS):
        done, start = 0.0, time.perf_counter()
        while (took := time.perf_counter() - start) < SLICE:
            operations = native.bench_peak(kind, iterations)
            if not operations:
                return 0.0
            done += operations
        rates.append(done / took)
    return statistics.median(rates)


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure_gpus(progress: Progress | None = None) -> tuple[tuple[Gpu, ...], tuple[str, ...]]:
    """(GPUs that torch sees, sentences about those that could not be measured). Never raises for a GPU's sake."""
    import torch

    found, notes = [], []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        (progress or _quiet)(f"measuring cuda:{index}")
        properties = torch.cuda.get_device_properties(index)
        try:
            gpu = _measure_gpu(index, properties)
        except RuntimeError as error:  # out of memory, or a GPU that this build of torch has no kernels for
            model = find_gpu(properties.name) or typical_gpu(properties.total_memory)
            gpu = Gpu(properties.name, properties.total_memory, model.bandwidth, model.bf16_ops, model.link)
            notes.append(
                f"cuda:{index} ({properties.name}) could not be measured and is taken for a {model.name}: "
                f"{str(error).strip().splitlines()[0]}. Free its memory, or give --gpu NAME."
            )
        found.append(gpu)
        torch.cuda.empty_cache()
    return tuple(found), tuple(notes)


def _measure_gpu(index: int, properties: Any) -> Gpu:
    import torch

    device = torch.device("cuda", index)
    free, _ = torch.cuda.mem_get_info(device)
    size, side = (COPY, MATRIX) if free > 4 * COPY else (free // 16, MATRIX // 4)
    with torch.cuda.device(device):
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        here, there = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
        matrix = torch.randn(side, side, device=device).to(dtype)
        copy = _gpu_seconds(lambda: there.copy_(here))
        link = _gpu_seconds(lambda: here.copy_(host, non_blocking=True))
        product = _gpu_seconds(lambda: matrix @ matrix)
    return Gpu(properties.name, properties.total_memory, 2 * size / copy, 2 * side**3 / product, size / link)


def _gpu_seconds(run: Callable[[], Any], times: int = 9) -> float:
    """Seconds of one run, the median of several after two to warm up."""
    import torch

    def waited() -> None:
        run()
        torch.cuda.synchronize()

    waited(), waited()
    return statistics.median(_seconds(waited) for _ in range(times))


# ---- described ---------------------------------------------------------------------------------------------

GPU_SIZES = (256 << 20, 1 << 40)
RAM_SIZES = (1 << 30, 64 << 40)
MOST_GPUS = 64
MOST_CORES = 1024
DESKTOP = 192 * GIB  # of RAM, at most: beyond it boards are servers' and have many memory channels
DESKTOP_CORES, SERVER_CORES = 16, 32
DESKTOP_BANDWIDTH, SERVER_BANDWIDTH = 70e9, 220e9  # two channels of DDR5-5600; eight of DDR5-4800, both less a fifth
CORE_OPS = {"int8": 400e9, "bf16": 200e9, "f32": 100e9}
"""Of a core with AVX-512 VNNI and BF16 that starts one 512-bit multiply-add a cycle at 3.1 GHz."""


def describe(
    gpus: Sequence[str] = (), ram: str | None = None, cores: int | None = None, progress: Progress | None = None
) -> Hardware:
    """The machine of the flags --gpu, --ram and --cores. Without any of them: this one, measured.

    Without `ram`, processor and RAM are this machine's. With `ram` and without `gpus` there is no GPU. Raises
    KTransformersError for what cannot be meant. What had to be assumed is said in `Hardware.assumptions`.
    """
    if not gpus and ram is None and cores is None:
        return measure(progress)
    found, notes = [], []
    for text in gpus:
        several, assumed = parse_gpus(text)
        found += several
        notes += assumed
    if len(found) > MOST_GPUS:
        raise KTransformersError(f"--gpu: found {len(found)} GPUs, expected at most {MOST_GPUS}. Leave some out.")
    if ram is None and cores is not None:
        raise KTransformersError(f"--cores {cores}: needs --ram too, such as --ram 64GiB: both describe a machine.")
    if ram is None:
        cpu = measure_cpu(progress)
        notes.append(
            f"Processor and RAM are this machine's, measured: {cpu.cores} cores, {format_bytes(cpu.ram)}, "
            f"{format_rate(cpu.read_bandwidth)}. Give --ram 64GiB for another one."
        )
    else:
        cpu, assumed = parse_cpu(ram, cores)
        notes += assumed
    return Hardware(cpu, tuple(found), measured=False, assumptions=tuple(dict.fromkeys(notes)))


def parse_gpus(text: str) -> tuple[list[Gpu], list[str]]:
    """`8x80GiB`, `2x4090`, or what `parse_gpu` takes -> (GPUs, what was assumed). Raises KTransformersError."""
    several = _SEVERAL.fullmatch(str(text).strip())
    if several is None or find_gpu(str(text).partition("@")[0]):  # names such as 7900xt have an x too
        gpu, assumed = parse_gpu(text)
        return [gpu], assumed
    count = int(several[1])
    if not 1 <= count <= MOST_GPUS:
        raise KTransformersError(f"--gpu {text!r}: {count} GPUs, expected 1 to {MOST_GPUS}, such as 8x{several[2]}.")
    gpu, assumed = parse_gpu(several[2])
    return [gpu] * count, assumed


_SEVERAL = re.compile(r"(\d{1,3})\s*[x×*]\s*(\S.*)", re.IGNORECASE)


def parse_gpu(text: str) -> tuple[Gpu, list[str]]:
    """`24GiB`, `24GiB@1008GB/s`, `4090`, `4090@900GB/s` -> (GPU, what was assumed). Raises KTransformersError."""
    what, sign, rate = str(text).partition("@")
    bandwidth = _bandwidth(rate, f"--gpu {text!r}, bandwidth") if sign else None
    model = find_gpu(what)
    if model is not None:
        return _known_gpu(model, bandwidth)
    if not _is_size(what):
        raise KTransformersError(
            f"--gpu {text!r}: no known GPU{closest_names(what)}. Give its memory, such as 24GiB or 24GiB@1008GB/s, for "
            "several 8x24GiB, or a name that `kt list gpus` shows."
        )
    memory = _within(parse_bytes(what, "--gpu"), GPU_SIZES, "--gpu", text, "24GiB; leave --gpu out for no GPU")
    return _sized_gpu(memory, bandwidth)


def _known_gpu(model: GpuModel, bandwidth: float | None) -> tuple[Gpu, list[str]]:
    gpu = Gpu(model.name, model.memory, bandwidth or model.bandwidth, model.bf16_ops, model.link)
    rate = "" if bandwidth else f"{format_rate(model.bandwidth)} of memory bandwidth, "
    return gpu, [
        f"GPU {model.name}: {rate}{format_rate(model.bf16_ops, 'OP/s')} in bf16 and {format_rate(model.link)} from RAM "
        f"are published figures. Give --gpu {model.name}@RATE where its memory is slower."
    ]


def _sized_gpu(memory: int, bandwidth: float | None) -> tuple[Gpu, list[str]]:
    model = typical_gpu(memory)
    if bandwidth:
        model = min(GPU_MODELS.values(), key=lambda m: abs(log(m.memory / memory)) + abs(log(m.bandwidth / bandwidth)))
    size = format_bytes(memory)
    rate = "" if bandwidth else f"{format_rate(model.bandwidth)} of memory bandwidth, "
    remedy = f"Give --gpu {model.name} or another name (kt list gpus)" + ("" if bandwidth else ", or SIZE@BANDWIDTH")
    gpu = Gpu(f"{size} GPU", memory, bandwidth or model.bandwidth, model.bf16_ops, model.link)
    return gpu, [
        f"GPU of {size}: taken for one like the {model.name}, with {rate}{format_rate(model.bf16_ops, 'OP/s')} in bf16 "
        f"and {format_rate(model.link)} from RAM. {remedy}."
    ]


def parse_cpu(ram_text: str, cores: int | None = None) -> tuple[Cpu, list[str]]:
    """`384GiB`, `384GiB@200GB/s` and a number of cores -> (processor and RAM, what was assumed).

    Raises KTransformersError.
    """
    what, sign, rate = str(ram_text).partition("@")
    ram = _within(parse_bytes(what, "--ram"), RAM_SIZES, "--ram", ram_text, "64GiB")
    if cores is not None and not is_whole(cores, 1, MOST_CORES):
        raise KTransformersError(f"--cores {cores}: expected a whole number from 1 to {MOST_CORES}.")
    desktop, size = ram <= DESKTOP, format_bytes(ram)
    kind = "desktop" if desktop else "server"
    bandwidth = DESKTOP_BANDWIDTH if desktop else SERVER_BANDWIDTH
    free = ram - (2 * GIB if ram >= 8 * GIB else ram // 4) - ram // 100
    notes = [f"RAM: {format_bytes(free)} of {size} are assumed to be free. Give --ram a smaller size if not."]
    if sign:
        bandwidth = _bandwidth(rate, f"--ram {ram_text!r}, bandwidth")
    else:
        notes.append(
            f"RAM: {format_rate(bandwidth)} is assumed, a {kind}'s. Give --ram SIZE@BANDWIDTH; "
            "`kt doctor` on that machine measures it."
        )
    if cores is None:
        cores = DESKTOP_CORES if desktop else SERVER_CORES
        notes.append(f"Processor: {cores} cores are assumed, a {kind}'s. Give --cores N.")
    int8, bf16, fp32 = (cores * ops for ops in CORE_OPS.values())
    notes.append(
        f"Processor: AVX-512 with VNNI and BF16 is assumed, {format_rate(CORE_OPS['int8'], 'OP/s')} in int8 and "
        f"{format_rate(CORE_OPS['bf16'], 'OP/s')} in bf16 per core. Run `kt plan` there without --ram to measure it."
    )
    return Cpu(f"{kind} of {cores} cores", cores, ram, free, bandwidth, int8, bf16, fp32, "avx512_bf16", 1), notes


def _is_size(text: str) -> bool:
    """Whether a size was meant, right or wrong: 4091 and 7900gre are no sizes, 24 and 24g are."""
    found = re.fullmatch(r"-?(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if not found:
        return False
    return found[2] in UNITS or found[2] in "kmgtp" and (found[2] != "" or float(found[1]) < 1000)


def _within(size: int, limits: tuple[int, int], flag: str, text: str, example: str) -> int:
    low, high = limits
    if not low <= size <= high:
        raise KTransformersError(
            f"{flag} {text!r}: {format_bytes(size)}, expected {format_bytes(low)} to {format_bytes(high)}, "
            f"such as {example}."
        )
    return size


def _bandwidth(text: str, subject: str) -> float:
    rate = parse_rate(text, subject)
    if not 1e9 <= rate <= 100e12:
        raise KTransformersError(f"{subject} {text!r}: expected 1 GB/s to 100 TB/s, such as 200GB/s.")
    return rate
