"""Kernels compiled for GPUs that are not there, and what their machine code says. Not a test.

Triton's wheel brings ptxas, cuobjdump and nvdisasm. Arguments are taken as a launch takes them, tensors on the meta
device: pointers and integers that are multiples of 16 are known to be such, which decides how loads are vectorised.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

NVIDIA = {"sm_80": 80, "sm_86": 86, "sm_89": 89, "sm_90": 90, "sm_120": 120}
AMD = {"gfx942": 64, "gfx1100": 32}
TARGETS = (*NVIDIA, *AMD)

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

_TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64",
    torch.uint8: "u8", torch.int8: "i8",
}  # fmt: skip


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """An argument that a kernel is compiled for."""
    return torch.empty(shape, dtype=dtype, device="meta")


@dataclass(frozen=True)
class Compiled:
    """shared: bytes. registers, spills: of a thread, spills in bytes. code: PTX, or AMD's assembly.

    loop: the instructions of the longest loop that holds no other.
    """

    shared: int
    registers: int
    spills: int
    code: str
    loop: list[str]

    def has(self, pattern: str) -> bool:
        return re.search(pattern, self.code) is not None


def target_of(name: str) -> GPUTarget:
    return GPUTarget("cuda", NVIDIA[name], 32) if name in NVIDIA else GPUTarget("hip", name, AMD[name])


def compile_kernel(kernel: Any, arguments: dict[str, Any], target: str) -> Compiled:
    """Compile for the arguments of a launch, `num_warps` and `num_stages` among them."""
    signature, constants, attrs, options = {}, {}, {}, {}
    names = kernel.arg_names
    constant = {name for name, param in zip(names, kernel.params, strict=True) if param.is_constexpr}
    for name, value in arguments.items():
        if name not in names:
            options[name] = value
        elif name in constant or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            pointer = isinstance(value, torch.Tensor)
            signature[name] = "*" + _TYPES[value.dtype] if pointer else "i32"
            if pointer or value % 16 == 0:
                attrs[(names.index(name),)] = [["tt.divisibility", 16]]
    signature = {name: signature[name] for name in names}
    source = ASTSource(kernel, signature, constants, attrs)
    made = triton.compile(source, target=target_of(target), options=options)
    return _nvidia(made) if target in NVIDIA else _amd(made)


def _nvidia(made: Any) -> Compiled:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(made.asm["cubin"])
        run = lambda *command: subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: E731
        usage, sass = run(BIN / "cuobjdump", "-res-usage", cubin), run(BIN / "nvdisasm", "-c", cubin)
    number = lambda what: int(re.search(rf"{what}:(\d+)", usage)[1])  # noqa: E731
    spills = number("STACK") + number("LOCAL")
    return Compiled(made.metadata.shared, number("REG"), spills, made.asm["ptx"], main_loop(sass))


def _amd(made: Any) -> Compiled:
    code = made.asm["amdgcn"]
    number = lambda what: int(re.search(rf"\.{what}:\s*(\d+)", code)[1])  # noqa: E731
    spills = 4 * number("vgpr_spill_count")
    return Compiled(made.metadata.shared, number("vgpr_count"), spills, code, main_loop(code))


_LABEL = re.compile(r"\s*(\.L\w+):")
_CODE = re.compile(r"\s+(?:/\*[0-9a-f]{4,}\*/\s+)?(?:@!?U?P\w+\s+)?([A-Za-z][A-Za-z0-9_.]*)\b(.*)")
_JUMP = re.compile(r"(?:BRA|s_c?branch).*?(\.L\w+)")


def main_loop(text: str) -> list[str]:
    """Opcodes from the target of a backward branch to the branch, of SASS or of AMD's assembly."""
    opcodes, labels, loops = [], {}, []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(opcodes)
        elif found := _CODE.match(line):
            opcodes.append(found[1])
            if (jump := _JUMP.search(line)) and jump[1] in labels:
                loops.append((labels[jump[1]], len(opcodes)))
    inner = [loop for loop in loops if not any(o != loop and loop[0] <= o[0] and o[1] <= loop[1] for o in loops)]
    start, stop = max(inner, key=lambda loop: loop[1] - loop[0], default=(0, 0))
    return opcodes[start:stop]
