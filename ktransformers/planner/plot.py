"""A plan as three plots in one PNG: memory per device, speed against context, speed against GPU memory.

matplotlib is an extra of the package (`pip install ktransformers[plot]`); without it this is one clear error.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from ktransformers.errors import KTransformersError, UnsupportedError
from ktransformers.machine.hardware import Gpu, Hardware
from ktransformers.machine.units import GIB
from ktransformers.planner.plan import Plan, Planner, Request
from ktransformers.planner.probes import Probes

KINDS = ("weights", "cache", "work")
GPU_SIZES = (0, 8, 12, 16, 24, 32, 48, 80, 96, 141)
"""GiB of GPU memory that the third plot asks about."""


def write_plots(
    planner: Planner, hardware: Hardware, request: Request, probes: Probes, found: Plan, path: Path
) -> None:
    """Draw `found` and what other contexts and GPUs would give. Raises UnsupportedError, KTransformersError."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError(
            "--plot: needs matplotlib, which is not installed. Run `pip install matplotlib`, or leave --plot out."
        ) from error
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    memory, context, gpus = figure.subplots(1, 3)
    _memory(memory, found)
    _context(context, planner, hardware, request, probes)
    _gpus(gpus, planner, hardware, request, probes)
    figure.suptitle(f"{found.model}, {found.format}")
    try:
        figure.savefig(path.expanduser(), format="png", dpi=110)
    except OSError as error:
        raise KTransformersError(f"--plot {path}: cannot be written: {error.strerror or error}.") from error


def _memory(axes: Any, found: Plan) -> None:
    devices = list(found.memory)
    left = [0.0] * len(devices)
    for kind in KINDS:
        shares = [100 * getattr(memory, kind) / memory.limit for memory in found.memory.values()]
        axes.barh(devices, shares, left=left, label=kind)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    for place, memory in enumerate(found.memory.values()):
        text = f"{memory.total / GIB:.1f} of {memory.limit / GIB:.1f} GiB"
        axes.text(2, place, text, va="center", color="white")
    axes.axvline(100, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set(title="memory", xlabel="% of capacity")
    axes.legend(loc="lower right")


def _context(axes: Any, planner: Planner, hardware: Hardware, request: Request, probes: Probes) -> None:
    lengths = [length for length in (512 << n for n in range(9)) if length <= max(request.context, 32768)]
    plans = [planner.answer(hardware, replace(request, context=length), probes) for length in lengths]
    _rates(axes, {n: plan.decode_full.rate if plan.fits else None for n, plan in zip(lengths, plans, strict=True)})
    axes.set(title="decode at full context", xlabel="tokens of context", ylabel="tokens/s", xscale="log")
    axes.set_ylim(bottom=0)


def _gpus(axes: Any, planner: Planner, hardware: Hardware, request: Request, probes: Probes) -> None:
    model = hardware.gpus[0] if hardware.gpus else Gpu("GPU", 24 * GIB, 1.0e12, 165e12, 26e9)
    rates = {}
    for size in GPU_SIZES:
        gpus = (replace(model, memory=size * GIB),) if size else ()
        plan = planner.answer(replace(hardware, gpus=gpus, measured=False), request, probes)
        rates[size] = plan.decode.rate if plan.fits else None
    _rates(axes, rates)
    axes.set(title=f"decode with one GPU like the {model.name}", xlabel="GiB of GPU memory", ylabel="tokens/s")
    axes.set_ylim(bottom=0)


def _rates(axes: Any, rates: dict[int, float | None]) -> None:
    """A line through the rates; what does not fit (None) has none and is marked on the axis."""
    axes.plot(list(rates), [float("nan") if rate is None else rate for rate in rates.values()], marker="o")
    if short := [size for size, rate in rates.items() if rate is None]:
        axes.plot(short, [0.0] * len(short), linestyle="", marker="x", color="red", label="does not fit")
        axes.legend()
