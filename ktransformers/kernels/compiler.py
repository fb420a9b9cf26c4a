"""The door to Triton, which need not be installed: files with kernels take `jit` and `tl` from here, so they import."""

import contextlib
import functools
from typing import Any

import torch

from ktransformers import env

try:
    import triton
    import triton.language as tl

    jit, missing = triton.jit, ""
except Exception as error:  # a Triton that does not fit torch or numpy fails in other ways than by its absence
    triton, missing = None, f"{type(error).__name__}: {error}"

    class tl:  # type: ignore[no-redef]
        """What the signatures of kernels name."""

        constexpr = None

    def jit(kernel: Any) -> Any:
        return kernel


ON_CPU = False
"""Whether to launch kernels on tensors of the CPU too, in Triton's interpreter (TRITON_INTERPRET=1). For tests."""


LEAST = (8, 0)
"""The first compute capability that Triton supports."""


def launchable(device: torch.device) -> bool:
    """Whether kernels can be launched on tensors of `device`. Elsewhere the reference computes."""
    return triton is not None and (device.type != "cpu" or ON_CPU)


def why_not(device: torch.device) -> str:
    """Why kernels do not compute what is on `device`, or ``""``. Starts no device."""
    if device.type == "cpu" and not ON_CPU or device.type not in ("cpu", "cuda"):
        return "its kernels run on GPUs of NVIDIA and AMD only"
    if not env.kernels():
        return "KT_KERNELS=0 wants none of its kernels"
    if triton is None:
        return f"its kernels need Triton, which cannot be imported ({missing}); pip install triton"
    if device.type == "cuda" and not torch.cuda.is_available():
        return "this machine has no such GPU"
    return ""


def too_old(device: torch.device) -> str:
    """Why Triton does not compile for a GPU that is there, or ``""``. Starts the device."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) >= LEAST:
        return ""
    return "Triton compiles for GPUs of compute capability 8.0 (RTX 30, A100) and later only."


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, arguments: dict[str, Any]) -> None:
    """Launch on the current stream of `device`. Triton itself goes to whichever device is current."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](**arguments)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs the device runs side by side, at least."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 64 if device.type != "cpu" else 4


@functools.cache
def warp_size(device: torch.device) -> int:
    """Threads of a warp: 64 on AMD's data centre chips."""
    return torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32


def dot_type(x: torch.Tensor) -> Any:
    """What the matrix units multiply. The interpreter has no bf16, and computes in float32."""
    if x.device.type == "cpu":
        return tl.float32
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}.get(x.dtype, tl.float32)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
