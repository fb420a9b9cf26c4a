"""Published figures of known GPUs, for plans on hardware that one need not own. A table; nothing is measured here."""

from collections.abc import Collection
from dataclasses import dataclass
from math import log

from ktransformers.errors import did_you_mean
from ktransformers.machine.units import GIB

PCIE = {3: 13e9, 4: 26e9, 5: 52e9}
"""PCIe generation -> bytes per second from pinned memory over 16 lanes: about 0.82 of the published 15.8, 31.5 and
63 GB/s, which is what copies reach after packet headers."""


@dataclass(frozen=True)
class GpuModel:
    """One model of GPU. `memory` in bytes; `bandwidth` and `link` (host to device) in bytes per second; `bf16_ops` in
    operations per second, two per multiply-add."""

    name: str
    memory: int
    bandwidth: float
    bf16_ops: float
    link: float


def _model(name: str, gib: float, gbs: float, tflops: float, pcie: int, lanes: int = 16) -> GpuModel:
    return GpuModel(name, round(gib * GIB), gbs * 1e9, tflops * 1e12, PCIE[pcie] * lanes / 16)


# Memory is what the driver reports, less than the name says where error correction takes a sixteenth (T4, A10, A40, L4,
# L20, L40S). Rates are dense (without 2:4 sparsity) bf16 with fp32 sums; fp16 for V100, T4 and 2080 Ti, which have no
# bf16. Sources: NVIDIA's whitepapers on Turing, GA102, Ada, RTX Blackwell and RTX PRO Blackwell, tables that compare
# models (GeForce runs fp32 sums at half the fp16 rate; of RTX 3060, 4060, 4060 Ti and 5060 Ti twice the published fp32
# rate, as for all others of their generations); NVIDIA's data sheets of V100, T4, A10, A30, A40, A100, A6000, L4, L20,
# L40S, H20, H100, H200, B200; AMD's product pages of RX 7900 XT and XTX, RX 9070 XT, PRO W7900, Instinct MI210, MI300X,
# MI325X, MI355X.
GPU_MODELS = {
    model.name: model
    for model in (
        _model("2080ti", 11, 616, 53.8, 3),
        _model("3060", 12, 360, 25.5, 4),
        _model("3070", 8, 448, 40.6, 4),
        _model("3080", 10, 760, 59.5, 4),
        _model("3090", 24, 936, 71, 4),
        _model("3090ti", 24, 1008, 80, 4),
        _model("4060", 8, 272, 30.2, 4, lanes=8),
        _model("4060ti-16g", 16, 288, 44.1, 4, lanes=8),
        _model("4070", 12, 504, 58.3, 4),
        _model("4070ti", 12, 504, 80.2, 4),
        _model("4070ti-super", 16, 672, 88.2, 4),
        _model("4080", 16, 717, 97.5, 4),
        _model("4080-super", 16, 736, 104.4, 4),
        _model("4090", 24, 1008, 165.2, 4),
        _model("4090d", 24, 1008, 147.1, 4),
        _model("5060ti-16g", 16, 448, 47.4, 5, lanes=8),
        _model("5070", 12, 672, 61.7, 5),
        _model("5070ti", 16, 896, 87.9, 5),
        _model("5080", 16, 960, 112.6, 5),
        _model("5090", 32, 1792, 209.5, 5),
        _model("rtx-pro-6000", 95.6, 1792, 503.8, 5),
        _model("a6000", 48, 768, 154.8, 4),
        _model("6000-ada", 48, 960, 364.2, 4),
        _model("v100-16g", 16, 900, 125, 3),
        _model("v100-32g", 32, 900, 125, 3),
        _model("t4", 15, 320, 65, 3),
        _model("a10", 22.5, 600, 125, 4),
        _model("a30", 24, 933, 165, 4),
        _model("a40", 45, 696, 149.7, 4),
        _model("a100-40g", 40, 1555, 312, 4),
        _model("a100-80g", 80, 2039, 312, 4),
        _model("l4", 22.5, 300, 121, 4),
        _model("l20", 45, 864, 119.5, 4),
        _model("l40s", 45, 864, 362, 4),
        _model("h20", 95.6, 4000, 148, 5),
        _model("h100", 80, 3350, 989, 5),
        _model("h100-pcie", 80, 2000, 756, 5),
        _model("h200", 140, 4800, 989, 5),
        _model("b200", 179, 8000, 2250, 5),
        _model("7900xt", 20, 800, 103, 4),
        _model("7900xtx", 24, 960, 122.8, 4),
        _model("9070xt", 16, 640, 195, 5),
        _model("w7900", 48, 864, 122.6, 4),
        _model("mi210", 64, 1638, 181, 4),
        _model("mi300x", 192, 5300, 1307, 5),
        _model("mi325x", 256, 6000, 1307, 5),
        _model("mi355x", 288, 8000, 2517, 5),
    )
}
"""Name -> model."""

BEFORE_AMPERE = ("2080ti", "v100-16g", "v100-32g", "t4")
"""Of a compute capability below 8.0, the first that Triton compiles for."""

TYPICAL = ("4060", "3080", "2080ti", "3060", "4060ti-16g", "7900xt", "4090", "5090", "a100-40g", "a6000", "mi210",
           "a100-80g", "rtx-pro-6000", "h200", "b200", "mi300x", "mi325x", "mi355x")  # fmt: skip
"""One model per size: what a GPU is taken for when only its size is given. Where several have the size, one of the most
common, rather slow than fast."""

_BRANDS = ("nvidia", "amd", "geforce", "radeon", "instinct", "tesla", "quadro", "rtx", "rx", "pro")


def _key(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum()).replace("gb", "g")


def find_gpu(name: str) -> GpuModel | None:
    """The model that `name` means, in any case and with or without its brand: `4090`, `RTX 4090`, `A100 80GB`.

    None if there is none, or more than one.
    """
    known = {_key(model.name): model for model in GPU_MODELS.values()}
    return known.get(_without_brand(_key(name), known))


def _without_brand(key: str, known: Collection[str]) -> str:
    """`key` without the brands before it, as far as that makes it one of those known."""
    while key not in known and (brand := next((b for b in _BRANDS if key.startswith(b)), "")):
        key = key.removeprefix(brand)
    return key


def closest_names(name: str) -> str:
    """``" (did you mean ...?)"`` for a name that is no known GPU."""
    spelled = {_key(model): model for model in GPU_MODELS}
    key = _without_brand(_key(name), spelled)
    if sizes := [model for model in GPU_MODELS if model.startswith(f"{key}-")]:
        return f" (did you mean {' or '.join(sizes)}?)"
    return did_you_mean(_key(name), spelled, spelled) or did_you_mean(key, spelled, spelled)


def typical_gpu(memory: int) -> GpuModel:
    """The typical model whose memory is nearest to `memory` bytes, by ratio."""
    return min((GPU_MODELS[name] for name in TYPICAL), key=lambda model: abs(log(model.memory / memory)))
