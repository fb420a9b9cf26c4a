"""Quantized weights in the exact tensor layouts that publishers use, each with the numbers it stands for.

Written from the formats' definitions, code by code in numpy, and not with the code under test: a maker takes (N, K)
and a random generator, and returns the tensors that a checkpoint holds, by their names after the layer's, and the
weight's values float32 [N, K]. Scales are random and not all alike; codes take every value there is.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]

Made = tuple[dict[str, Tensor], np.ndarray]


def _scales(rng, *shape, dtype=torch.float32) -> Tensor:
    return torch.from_numpy(rng.uniform(0.004, 0.02, shape).astype(np.float32)).to(dtype)


def _spread(scales, rows: int, cols: int, n: int, k: int) -> np.ndarray:
    """One number per block of rows x cols, for each element of [n, k]."""
    scales = np.asarray(scales.float() if isinstance(scales, Tensor) else scales)
    return np.array([[scales[r // rows, c // cols] for c in range(k)] for r in range(n)], np.float32)


def _e8m0(rng, *shape) -> tuple[Tensor, np.ndarray]:
    stored = rng.integers(117, 123, shape).astype(np.uint8)
    return torch.from_numpy(stored), np.exp2(stored.astype(np.float32) - 127)


def _f8(rng, n: int, k: int) -> tuple[Tensor, np.ndarray]:
    """Every finite e4m3 code, with its value by the format's definition: sign, 4 bits of exponent, 3 of mantissa."""
    finite = np.array([c for c in range(256) if c & 127 != 127], np.uint8)
    codes = np.resize(rng.permutation(finite), n * k).reshape(n, k)
    exponent, mantissa = (codes >> 3 & 15).astype(np.int32), (codes & 7).astype(np.float32)
    size = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    values = np.where(codes & 128, -size, size).astype(np.float32)
    return torch.from_numpy(codes).view(torch.float8_e4m3fn), values


def _fp4(rng, n: int, k: int) -> tuple[Tensor, np.ndarray]:
    codes = rng.integers(0, 16, (n, k))
    packed = np.array([[row[c] | row[c + 1] << 4 for c in range(0, k, 2)] for row in codes], np.uint8)
    return torch.from_numpy(packed), FP4[codes]


def words(codes: np.ndarray, bits: int) -> Tensor:
    """Unsigned codes packed along the last dimension into int32, the first in the lowest bits, padded with zeros."""
    per = 32 // bits
    padded = np.zeros((len(codes), -(-codes.shape[1] // per) * per), np.uint32)
    padded[:, : codes.shape[1]] = codes
    packed = np.zeros((len(codes), padded.shape[1] // per), np.uint32)
    for j in range(per):
        packed |= padded[:, j::per] << np.uint32(bits * j)
    return torch.from_numpy(packed.view(np.int32))


def fp8_block(n, k, rng, dtype=torch.float32, suffix="weight_scale_inv") -> Made:
    codes, values = _f8(rng, n, k)
    scales = _scales(rng, -(-n // 128), -(-k // 128), dtype=dtype)
    return {"weight": codes, suffix: scales}, values * _spread(scales, 128, 128, n, k)


def fp8_block_ue8m0(n, k, rng) -> Made:
    codes, values = _f8(rng, n, k)
    stored, scales = _e8m0(rng, -(-n // 128), -(-k // 128))
    return {"weight": codes, "scale": stored.view(torch.float8_e8m0fnu)}, values * _spread(scales, 128, 128, n, k)


def fp8_channel(n, k, rng) -> Made:
    codes, values = _f8(rng, n, k)
    scales = _scales(rng, n, 1, dtype=torch.bfloat16)
    return {"weight": codes, "weight_scale": scales}, values * _spread(scales, 1, k, n, k)


def fp8_tensor(n, k, rng) -> Made:
    codes, values = _f8(rng, n, k)
    scale = _scales(rng, 1)[0]
    parts = {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(0.5)}
    return parts, values * np.float32(scale)


def mxfp8(n, k, rng) -> Made:
    codes, values = _f8(rng, n, k)
    stored, scales = _e8m0(rng, n, k // 32)
    return {"weight": codes, "weight_scale_inv": stored}, values * _spread(scales, 1, 32, n, k)


def mxfp4(n, k, rng) -> Made:
    codes, values = _fp4(rng, n, k)
    stored, scales = _e8m0(rng, n, k // 32)
    parts = {"weight": codes.view(torch.int8), "scale": stored.view(torch.float8_e8m0fnu)}
    return parts, values * _spread(scales, 1, 32, n, k)


def mxfp4_packed(n, k, rng) -> Made:
    parts, values = mxfp4(n, k, rng)
    return {
        "weight_packed": parts["weight"].view(torch.uint8),
        "weight_scale": parts["scale"].view(torch.uint8),
    }, values


def _nvfp4(n, k, rng) -> tuple[Tensor, Tensor, np.ndarray]:
    codes, values = _fp4(rng, n, k)
    stored = torch.from_numpy(rng.uniform(1, 400, (n, k // 16)).astype(np.float32)).to(torch.float8_e4m3fn)
    return codes, stored, values * _spread(stored, 1, 16, n, k)


def nvfp4_modelopt(n, k, rng) -> Made:
    codes, stored, values = _nvfp4(n, k, rng)
    factor = torch.tensor(2.5e-5)
    parts = {"weight": codes, "weight_scale": stored, "weight_scale_2": factor, "input_scale": torch.tensor(0.1)}
    return parts, values * np.float32(factor)


def nvfp4_packed(n, k, rng) -> Made:
    codes, stored, values = _nvfp4(n, k, rng)
    factor = torch.tensor([40000.0])
    parts = {"weight_packed": codes, "weight_scale": stored, "weight_global_scale": factor}
    return parts | {"input_global_scale": torch.tensor([3.0])}, values / np.float32(factor)


def _packed_ints(n, k, rng, bits, group, asymmetric=False) -> Made:
    codes, middle = rng.integers(0, 1 << bits, (n, k)), 1 << (bits - 1)
    scales = _scales(rng, n, k // group, dtype=torch.bfloat16)
    parts = {"weight_packed": words(codes, bits), "weight_scale": scales, "weight_shape": torch.tensor([n, k])}
    zeros = np.full((n, k // group), middle)
    if asymmetric:
        zeros = rng.integers(0, 1 << bits, (n, k // group))
        parts["weight_zero_point"] = words(zeros.T, bits).T.contiguous()
    return parts, (codes - _spread(zeros, 1, group, n, k)) * _spread(scales, 1, group, n, k)


def int4_packed(n, k, rng) -> Made:
    return _packed_ints(n, k, rng, 4, 32)


def int4_bytes(n, k, rng) -> Made:
    parts, values = int4_packed(n, k, rng)
    return parts | {"weight_packed": parts["weight_packed"].view(torch.uint8)}, values


def int4_packed_asymmetric(n, k, rng) -> Made:
    return _packed_ints(n, k, rng, 4, 32, asymmetric=True)


def int4_row(n, k, rng) -> Made:
    return _packed_ints(n, k, rng, 4, k)


def int8_packed(n, k, rng) -> Made:
    return _packed_ints(n, k, rng, 8, 32)


def int8_packed_asymmetric(n, k, rng) -> Made:
    return _packed_ints(n, k, rng, 8, k, asymmetric=True)


def int8_row(n, k, rng) -> Made:
    codes = rng.integers(-128, 128, (n, k)).astype(np.int8)
    scales = _scales(rng, n, 1)
    return {"weight": torch.from_numpy(codes), "weight_scale": scales}, codes * _spread(scales, 1, k, n, k)


def int8_group(n, k, rng) -> Made:
    codes = rng.integers(-128, 128, (n, k)).astype(np.int8)
    scales = _scales(rng, n, k // 32, dtype=torch.float16)
    return {"weight": torch.from_numpy(codes), "weight_scale": scales}, codes * _spread(scales, 1, 32, n, k)


def _gptq(n, k, rng, bits=4, group=32, symmetric=True, act_order=False, stored_less=1) -> Made:
    codes = rng.integers(0, 1 << bits, (n, k))
    groups = np.arange(k) // group
    if act_order:
        groups = rng.permutation(groups)
    scales = _scales(rng, k // group, n, dtype=torch.float16)
    zeros = np.full((k // group, n), 1 << (bits - 1)) if symmetric else rng.integers(1, 1 << bits, (k // group, n))
    parts = {
        "qweight": words(codes, bits).T.contiguous(),
        "qzeros": words(zeros - stored_less, bits),
        "scales": scales,
        "g_idx": torch.from_numpy(groups.astype(np.int32)),
    }
    return parts, (codes - zeros[groups].T).astype(np.float32) * np.asarray(scales.float())[groups].T


def gptq4(n, k, rng) -> Made:
    return _gptq(n, k, rng)


def gptq4_v2(n, k, rng) -> Made:
    return _gptq(n, k, rng, symmetric=False, stored_less=0)


def gptq4_act_order(n, k, rng) -> Made:
    return _gptq(n, k, rng, symmetric=False, act_order=True)


def gptq8(n, k, rng) -> Made:
    return _gptq(n, k, rng, bits=8, symmetric=False)


def awq4(n, k, rng) -> Made:
    group = 32
    codes, zeros = rng.integers(0, 16, (n, k)), rng.integers(0, 16, (n, k // group))
    scales = _scales(rng, k // group, n, dtype=torch.float16)

    def pack(values: np.ndarray) -> Tensor:  # [n, x] -> [x, n / 8]: eight rows in a word, in AWQ's order
        ordered = values.T.reshape(values.shape[1], -1, 8)[:, :, AWQ_ORDER].reshape(values.shape[1], -1)
        return words(ordered, 4)

    parts = {"qweight": pack(codes), "qzeros": pack(zeros), "scales": scales}
    return parts, (codes - _spread(zeros, 1, group, n, k)) * _spread(scales.T, 1, group, n, k)


def _ints(bits: int, **more) -> dict:
    weights = {"num_bits": bits, "type": "int", **more}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}

FORMATS: dict[str, tuple[Callable[..., Made], str, str, dict]] = {
    # maker, the type and the method that users name it by, quantization_config
    "fp8_block": (fp8_block, "F8_E4M3", "FP8", {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "fp8_block_bf16": (lambda n, k, rng: fp8_block(n, k, rng, torch.bfloat16, "weight_scale"), "F8_E4M3", "FP8", {}),
    "fp8_block_ue8m0": (fp8_block_ue8m0, "F8_E4M3", "FP8", {"quant_method": "fp8", "scale_fmt": "ue8m0"}),
    "fp8_channel": (fp8_channel, "F8_E4M3", "FP8_PERCHANNEL", {}),
    "fp8_tensor": (fp8_tensor, "F8_E4M3", "FP8_PERTENSOR", {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "mxfp8": (mxfp8, "F8_E4M3", "MXFP8", {"quant_method": "mxfp8", "weight_block_size": [1, 32]}),
    "mxfp4": (mxfp4, "F4_E2M1", "MXFP4", {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "mxfp4_packed": (mxfp4_packed, "F4_E2M1", "MXFP4", {"quant_method": "compressed-tensors"}),
    "nvfp4_modelopt": (nvfp4_modelopt, "F4_E2M1", "NVFP4", {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "nvfp4_packed": (nvfp4_packed, "F4_E2M1", "NVFP4", {"quant_method": "compressed-tensors"}),
    "int4_packed": (int4_packed, "I4", "RAWINT4", _ints(4, group_size=32)),
    "int4_packed_unsaid": (int4_packed, "I4", "RAWINT4", {}),
    "int4_bytes": (int4_bytes, "I4", "RAWINT4", {}),
    "int4_packed_asymmetric": (int4_packed_asymmetric, "I4", "RAWINT4", _ints(4, symmetric=False)),
    "int4_row": (int4_row, "I4", "AMXINT4", _ints(4, strategy="channel")),
    "int8_packed": (int8_packed, "U8", "RAWINT8", _ints(8, group_size=32)),
    "int8_packed_asymmetric": (int8_packed_asymmetric, "U8", "AMXINT8", _ints(8, symmetric=False)),
    "int8_row": (int8_row, "I8", "AMXINT8", _ints(8, strategy="channel")),
    "int8_group": (int8_group, "I8", "RAWINT8", _ints(8, group_size=32)),
    "gptq4": (gptq4, "GPTQ4", "GPTQ_INT4", GPTQ),
    "gptq4_v2": (gptq4_v2, "GPTQ4", "GPTQ_INT4", GPTQ | {"checkpoint_format": "gptq_v2"}),
    "gptq4_act_order": (gptq4_act_order, "GPTQ4", "GPTQ_INT4", GPTQ | {"desc_act": True}),
    "gptq4_unsaid": (gptq4_act_order, "GPTQ4", "GPTQ_INT4", {}),
    "gptq8": (gptq8, "GPTQ8", "GPTQ_INT8", GPTQ | {"bits": 8}),
    "awq4": (awq4, "AWQ4", "AWQ_INT4", {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}),
}
