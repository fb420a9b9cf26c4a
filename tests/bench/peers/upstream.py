"""Upstream's kernels (PyPI `kt-kernel`) as a peer of `make bench-peers`.

Its Python wrapper wants CUDA and checkpoint files, so its C++ objects are driven directly, configured as that wrapper
configures them, each with the class that the wrapper's own selection picks on this processor.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

from tests.bench.peers.child import Missing, Peer, serve
from tests.bench.peers.work import ROLES, Case, Tensors, Work

LLAMAFILE = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12,
    "Q5_K": 13, "Q6_K": 14, "IQ2_XXS": 16, "IQ2_XS": 17, "IQ3_XXS": 18, "IQ1_S": 19, "IQ4_NL": 20, "IQ3_S": 21,
    "IQ2_S": 22, "IQ4_XS": 23,
}  # fmt: skip
"""GGUF types that its LLAMAFILE method takes, with their ids."""
BF16_ID = 30
BITS = {"FP8": 8, "MXFP8": 8, "RAWINT4": 4, "GPTQ_INT4": 4, "MXFP4": 4, "NVFP4": 4}
GROUP = {"FP8": 128, "MXFP8": 32, "RAWINT4": 32, "GPTQ_INT4": 128, "MXFP4": 32, "NVFP4": 16}


def selected(name: str) -> str:
    """The class that upstream's wrapper takes for a method on this processor."""
    from kt_kernel import kt_kernel_ext
    from kt_kernel.utils import amx

    have = set(dir(kt_kernel_ext.moe))
    first = lambda *names: next((n for n in names if n in have), None)  # noqa: E731
    chosen: Any
    if name in LLAMAFILE:
        chosen = first("MOE")
    elif name == "RAWINT4":
        chosen = amx._select_rawint4_backend(GROUP[name])
    elif name == "GPTQ_INT4":
        chosen = amx._select_gptq_int4_backend(GROUP[name])
    elif name in ("MXFP4", "NVFP4"):
        chosen = amx._select_mxfp4_backend()
    elif name == "MXFP8":
        chosen = amx._select_mxfp8_backend()
    else:
        chosen = {
            "BF16": first("AMXBF16_MOE", "AVX2BF16_MOE"), "FP8": first("AMXFP8_MOE", "AVX2FP8_MOE"),
            "FP8_PERCHANNEL": first("AMXFP8PerChannel_MOE"), "AMXINT8": first("AMXInt8_MOE"),
            "AMXINT4": first("AMXInt4_MOE"),
        }.get(name, "")  # fmt: skip
        if chosen == "":
            raise Missing("has no method for this type")
    if chosen is None:
        raise Missing("its build for this instruction set has no class for this type")
    return chosen if isinstance(chosen, str) else chosen.__name__


def fp4(tensors: Tensors, scale_bytes: int, codes: int) -> tuple[np.ndarray, torch.Tensor]:
    """GGUF's MXFP4 and NVFP4 blocks as nibbles in column order and bf16 scales, which is what its loader makes.

    A MXFP4 block of 32: an e8m0 scale, then 16 bytes; column i is the low nibble of byte i, column 16+i its high one.
    """
    raw = tensors["raw"]
    blocks = raw.reshape(raw.shape[0], -1, scale_bytes + codes // 2)
    nibbles = blocks[..., scale_bytes:]
    if scale_bytes == 1:
        order = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1)
        scale = torch.from_numpy(2.0 ** (blocks[..., 0].astype(np.float32) - 127))
    else:  # NVFP4: four unsigned e4m3 scales, then four runs of 8 bytes, each 16 columns in the same two halves
        runs = nibbles.reshape(*nibbles.shape[:-1], 4, 8)
        order = np.concatenate([runs & 15, runs >> 4], axis=-1)
        scale = torch.from_numpy(blocks[..., :4].copy()).view(torch.float8_e4m3fn).float()
    flat = order.reshape(raw.shape[0], -1)
    return flat[:, 0::2] | flat[:, 1::2] << 4, scale.reshape(raw.shape[0], -1).bfloat16()


def pointers(name: str, tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One matrix and its scales in the layouts of upstream's loaders."""
    if name in LLAMAFILE or name == "BF16":
        return torch.from_numpy(tensors["raw"]), None
    if name in ("MXFP4", "NVFP4"):
        codes, scale = fp4(tensors, *((1, 32) if name == "MXFP4" else (4, 64)))
        return torch.from_numpy(np.ascontiguousarray(codes)), scale
    if name == "GPTQ_INT4":
        return torch.from_numpy(tensors["qweight"]), torch.from_numpy(tensors["scales"]).float()
    weight, scale = torch.from_numpy(tensors["weight"]), torch.from_numpy(tensors["scale"])
    if name.startswith("AMXINT"):  # quantized by itself, from bf16
        return (weight.float() * scale.float().unsqueeze(-1)).bfloat16(), None
    return weight, scale


class Upstream(Peer):
    def load(self, work: Work) -> str:
        try:
            import kt_kernel
            from kt_kernel import kt_kernel_ext as ext
        except Exception as error:
            raise Missing(f"kt_kernel does not import: {type(error).__name__}: {error}") from error
        name = work.type
        if name == "NVFP4":
            os.environ.setdefault("KT_MXFP4_BACKEND", "avx2")  # its only class with groups of 16
        class_name = selected(name)
        if name in LLAMAFILE and work.inner % 256:
            raise Missing("its LLAMAFILE method wants an intermediate size that is a multiple of 256")
        torch.set_num_threads(work.threads)
        pool = ext.WorkerPoolConfig()
        pool.subpool_count, pool.subpool_numa_map, pool.subpool_thread_count = 1, [0], [work.threads]
        self.infer = ext.CPUInfer(pool)
        self.mask = torch.zeros(work.experts, dtype=torch.bool)
        self.order = torch.arange(work.experts, dtype=torch.int64)
        self.work, self.keep = work, []
        self.layers = [self.layer(ext, getattr(ext.moe, class_name), i) for i in range(work.layers)]
        return f"{class_name}, {kt_kernel.__cpu_variant__}"

    def layer(self, ext: Any, kind: Any, index: int) -> Any:
        work, name = self.work, self.work.type
        config = ext.moe.MOEConfig(work.experts, work.per_token, work.hidden, work.inner, self.mask.data_ptr())
        config.layer_idx, config.max_len, config.pool = index, max(work.tokens, 64), self.infer.backend_
        if name in LLAMAFILE:
            config.m_block, config.group_min_len, config.group_max_len = 32, 10, config.max_len
            config.gate_type = config.up_type = config.down_type = LLAMAFILE[name]
            config.hidden_type = BF16_ID
        elif name in GROUP:
            config.quant_config.bits, config.quant_config.group_size = BITS[name], GROUP[name]
            config.quant_config.zero_point = False
        elif name == "FP8_PERCHANNEL":
            config.quant_config.bits, config.quant_config.per_channel = 8, True
            config.quant_config.zero_point = False
        sources = []
        for role in ROLES:
            some = [pointers(name, t) for t in work.tensors[role]]
            pick = [some[e % len(some)] for e in range(work.experts)]
            if name in LLAMAFILE or name.startswith("AMXINT"):
                whole = torch.stack([w for w, _ in pick])
                setattr(config, f"{role}_proj", whole.data_ptr())
                sources.append(whole)
            else:
                setattr(config, f"{role}_projs", [[w.data_ptr() for w, _ in pick]])
                setattr(config, f"{role}_scales", [[0 if s is None else s.data_ptr() for _, s in pick]])
                sources.append(some)
        moe = kind(config)
        self.infer.submit(moe.load_weights_task(self.order.data_ptr()))
        self.infer.sync()
        if name in LLAMAFILE:
            self.keep.append(sources)  # this class goes on reading the source
        return moe

    def prepare(self, case: Case) -> str:
        self.hidden = torch.from_numpy(case.hidden).bfloat16()
        self.draws = [(torch.from_numpy(i), torch.from_numpy(w)) for i, w in case.draws]
        self.count = torch.tensor([case.tokens], dtype=torch.int32)
        self.out = torch.empty_like(self.hidden)
        return ""

    def call(self, layer: int, draw: int) -> None:
        ids, weights = self.draws[draw]
        task = self.layers[layer].forward_task(
            self.count.data_ptr(), self.work.per_token, ids.data_ptr(), weights.data_ptr(), self.hidden.data_ptr(),
            self.out.data_ptr(), False,
        )  # fmt: skip
        self.infer.submit(task)
        self.infer.sync()

    def output(self) -> np.ndarray:
        return self.out.float().numpy()


if __name__ == "__main__":
    serve(Upstream)
