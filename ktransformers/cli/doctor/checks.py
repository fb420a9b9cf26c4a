"""The checks of `kt doctor`. Each group is a generator of Checks that may raise; the command catches and shows.

Imports torch, through native: the command imports this file when it runs.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

import torch

from ktransformers import env, native
from ktransformers.cli.config import Setting
from ktransformers.cli.config import settings as read_settings
from ktransformers.cli.doctor import instruction_sets, kernel_check
from ktransformers.cli.version import installed_version, versions
from ktransformers.errors import NativeError
from ktransformers.machine import hardware, system
from ktransformers.machine.units import GIB, format_bytes, format_rate

ROOM = 50 * GIB
"""Free disk below which a note is made: a 30B model in four bits takes 18 GB, a 100B one 60."""


@dataclass(frozen=True)
class Check:
    """One thing looked at. `status`: "ok", "note" (works, could be better) or "problem" (something fails or is wrong);
    `fix`: for the latter two what to do, in a sentence."""

    group: str
    name: str
    status: str
    found: str
    fix: str = ""


def parts(
    settings: list[Setting], measured: dict[str, Any], quick: bool, say: Callable[[str], Any]
) -> dict[str, Callable[[], Iterator[Check]]]:
    """Group -> its checks, in order. Speeds that are measured are put into `measured`."""
    return {
        "Processor": processor,
        "Memory": memory,
        "Speed": partial(speed, measured, quick, say),
        "Kernels": partial(kernels, say),
        "GPUs": partial(gpus, measured, quick, say),
        "Software": software,
        "Disk": disk,
        "Settings": partial(settings_in_use, settings),
    }


@contextmanager
def usable_settings() -> Iterator[list[Setting]]:
    """The KT_* variables as found; while this lasts, those that cannot be used are out of the environment, so that each
    is one problem and hides no other."""
    saved = {name: os.environ[name] for name in env.VARIABLES if name in os.environ}
    found = read_settings()
    try:
        for setting in found:
            if setting.problem and setting.name in saved:
                del os.environ[setting.name]
        if native.available():
            found = [_library_judges(setting) for setting in found]
        yield found
    finally:
        os.environ.update(saved)


def _library_judges(setting: Setting) -> Setting:
    """What only the C library can say: whether this machine has the instruction set, whether a pool can be made so."""
    probe = {"KT_ISA": native.isa, "KT_NUMA": native.threads}.get(setting.name)
    if probe is None or setting.name not in os.environ:
        return setting
    try:
        probe()
    except NativeError as error:
        del os.environ[setting.name]
        return replace(setting, problem=f"{error} Unset {setting.name} or correct it.")
    return setting


# ---- processor and memory ----------------------------------------------------------------------------------


def processor() -> Iterator[Check]:
    """Name, cores, NUMA nodes, threads, instruction sets."""
    yield Check("Processor", "name", "ok", system.cpu_name())
    quota = system.cpu_quota()
    limit = "no cgroup limit" if quota is None else f"a cgroup limit of {quota:g}"
    seen = f"{system.affinity()} of {os.cpu_count()} hardware threads may be used, {limit}"
    if not native.available():
        yield Check("Processor", "cores", "ok", seen)
        yield Check("Processor", "C library", "problem", "not built, or does not load", _not_built())
        return
    cores, threads = native.default_threads(), native.threads()
    yield Check("Processor", "cores", "ok", f"{cores}: {seen}")
    yield Check("Processor", "NUMA nodes", "ok", str(system.numa_nodes()))
    if threads > cores:
        fix = "Unset KT_THREADS: more threads than cores wait for one another."
        yield Check("Processor", "threads", "note", f"{threads} on {cores} cores", fix)
    else:
        yield Check("Processor", "threads", "ok", str(threads))
    yield _chosen()
    usable = [name for name in native.isas() if name != native.isa()]
    yield Check("Processor", "also run here", "ok", ", ".join(usable) or "none")
    for name, why in instruction_sets.missing().items():
        if why == instruction_sets.NOT_COMPILED:
            fix = "Build again, if need be with a newer compiler: `make native`."
            yield Check("Processor", name, "note", f"not here: {why}", fix)
        else:
            yield Check("Processor", name, "ok", f"not here: {why}")


def _not_built() -> str:
    try:
        native.isas()
    except NativeError as error:
        return f"{error}"
    return native.NOT_BUILT


def _chosen() -> Check:
    chosen, best = native.isa(), instruction_sets.best()
    if chosen != best:
        return Check("Processor", "instruction set", "note", f"{chosen}, though {best} runs here: KT_ISA says so",
                     "Unset KT_ISA to use the widest.")  # fmt: skip
    if best == "portable":
        return Check("Processor", "instruction set", "note", "portable: plain C, many times slower than vector kernels",
                     "Use a processor with AVX2 or NEON dot products, or build with a compiler for it.")  # fmt: skip
    return Check("Processor", "instruction set", "ok", f"{chosen}: the widest that runs here")


def memory() -> Iterator[Check]:
    """RAM within the cgroup's limit, and huge pages."""
    total, available = system.memory()
    found = f"{format_bytes(available)} of {format_bytes(total)} are free"
    if available < total / 4:
        yield Check("Memory", "RAM", "note", found, "Close what holds the rest before a large model is loaded.")
    else:
        yield Check("Memory", "RAM", "ok", found)
    setting = system.huge_pages()
    if setting == "never":
        fix = "As root: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled; then KT_HUGE_PAGES=1 has an effect."
        yield Check("Memory", "huge pages", "note", "never: decoding from 4 KiB pages can be a third slower", fix)
    else:
        yield Check("Memory", "huge pages", "ok", setting or "not known to this system")


def speed(measured: dict[str, Any], quick: bool, say: Callable[[str], Any]) -> Iterator[Check]:
    """Read bandwidth and peaks, measured."""
    if quick or not native.available():
        return
    load, cores = os.getloadavg()[0], native.default_threads()
    measured["cpu"] = cpu = hardware.measure_cpu(say)
    yield Check("Speed", "reading RAM", "ok", f"{format_rate(cpu.read_bandwidth)} on {native.threads()} threads")
    for name, ops in (("int8", cpu.int8_ops), ("bf16", cpu.bf16_ops), ("fp32", cpu.fp32_ops)):
        yield Check("Speed", f"{name} peak", "ok", format_rate(ops, "OP/s") if ops else "none; computed in fp32")
    if load > cores / 2:
        fix = "Run again when the machine is idle: these figures are too low."
        yield Check("Speed", "other work", "note", f"a load of {load:.1f} on {cores} cores", fix)


# ---- kernels and GPUs --------------------------------------------------------------------------------------


def kernels(say: Callable[[str], Any]) -> Iterator[Check]:
    """A MoE layer and two linears, on every instruction set, held to torch."""
    if not native.available():
        return
    say("running kernels")
    for result in kernel_check.check_kernels(native.isas()):
        found = f"error {result.error:.2%} of the dequantized answer"
        if result.ok:
            yield Check("Kernels", result.isa, "ok", f"OK, {found}")
            continue
        wrong = ", ".join(f"{name} {error:.2%}" for name, error in result.errors.items())
        lower = native.isas()[: native.isas().index(result.isa)]
        fix = f"Set KT_ISA={lower[-1]} if that is OK, and report this" if lower else "Report this"
        yield Check("Kernels", result.isa, "problem", f"FAIL, {found} ({wrong})", f"{fix} with `kt doctor --json`.")


def gpus(measured: dict[str, Any], quick: bool, say: Callable[[str], Any]) -> Iterator[Check]:
    """torch's build, and every GPU that it sees."""
    build = (
        f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}" if torch.version.hip else ""
    )
    devices = [path for path in ("/dev/nvidia0", "/dev/kfd", "/dev/dxg") if Path(path).exists()]
    if not torch.cuda.is_available():
        measured["gpus"] = []
        if not devices:
            yield Check("GPUs", "found", "ok", f"none; everything runs on the CPU (torch: {build or 'CPU build'})")
        elif build:
            fix = "See whether nvidia-smi or rocm-smi works: the driver is missing or too old for this torch."
            yield Check("GPUs", "found", "problem", f"{devices[0]} is there, but torch ({build}) finds no GPU", fix)
        else:
            fix = "Install torch's build for your GPU: https://pytorch.org/get-started."
            yield Check("GPUs", "found", "note", f"{devices[0]} is there, but torch is a CPU build", fix)
        return
    yield Check("GPUs", "torch", "ok", build)
    notes: tuple[str, ...] = ()
    if not quick:
        measured["gpus"], notes = hardware.measure_gpus(say)
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found = f"{properties.name}, {format_bytes(properties.total_memory)}"
        if not quick:
            gpu = measured["gpus"][index]
            found += f", {format_rate(gpu.bandwidth)}, {format_rate(gpu.bf16_ops, 'OP/s')} in bf16, "
            found += f"{format_rate(gpu.link)} from RAM"
        note = next((note for note in notes if note.startswith(f"cuda:{index} ")), "")
        yield Check("GPUs", f"cuda:{index}", "note" if note else "ok", found, note)


# ---- software, disk, settings ------------------------------------------------------------------------------


def software() -> Iterator[Check]:
    """Versions, held to what the package asks for where it is installed."""
    from packaging.requirements import Requirement

    found = versions()
    yield Check("Software", "ktransformers", "ok", f"{found['ktransformers']} in {found['path']}")
    yield Check("Software", "python", "ok", f"{found['python']}, {found['system']}")
    try:
        wanted = [Requirement(text) for text in requires("ktransformers") or []]
    except PackageNotFoundError:  # a checkout that was not installed
        wanted = [Requirement(name) for name in ("torch", "transformers", "safetensors", "gguf")]
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version, fix = installed_version(requirement.name), f"pip install '{requirement.name}{requirement.specifier}'."
        if version is None:
            yield Check("Software", requirement.name, "problem", "not installed", fix)
        elif not requirement.specifier.contains(version.partition("+")[0], prereleases=True):
            yield Check("Software", requirement.name, "problem", f"{version}, expected {requirement.specifier}", fix)
        else:
            yield Check("Software", requirement.name, "ok", version)


def disk() -> Iterator[Check]:
    """Room where the Hugging Face cache is."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = there = Path(HF_HUB_CACHE).expanduser().absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    found = f"{format_bytes(free)} free for {folder}"
    if free < ROOM:
        yield Check(
            "Disk", "models", "note", found, "Set HF_HOME to a folder with room: large models take 20 to 700 GB."
        )
    else:
        yield Check("Disk", "models", "ok", found)


def settings_in_use(settings: list[Setting]) -> Iterator[Check]:
    """KT_* variables that are set, and whether they can be used."""
    given = [setting for setting in settings if setting.source == "environment"]
    if not given:
        yield Check("Settings", "KT_*", "ok", "none set; `kt config` lists them")
    for setting in given:
        known = setting.name in env.VARIABLES
        if setting.problem:
            yield Check("Settings", setting.name, "problem" if known else "note", setting.value, setting.problem)
        else:
            yield Check("Settings", setting.name, "ok", setting.value)
