"""llama.cpp as a peer of `make bench-peers`: ggml's graph of a MoE FFN, driven through ctypes.

The graph is llama.cpp's: mul_mat_id for gate and up, swiglu, mul_mat_id for down, weights, a sum over the K experts.
KT_PEER_GGML names the folder of libggml-*.so. The second argument "repack" puts weights into ggml's repacked
buffers, llama.cpp's default where its CPU code has a layout for the type. More than 512 tokens run as
llama.cpp's micro-batches (n_ubatch) of 512.
"""

from __future__ import annotations

import ctypes as c
import os
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.bench.peers.child import Missing, Peer, serve
from tests.bench.peers.work import GGUF, ROLES, Case, Work

TYPE_IDS = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12,
    "Q5_K": 13, "Q6_K": 14, "IQ2_XXS": 16, "IQ2_XS": 17, "IQ3_XXS": 18, "IQ1_S": 19, "IQ4_NL": 20, "IQ3_S": 21,
    "IQ2_S": 22, "IQ4_XS": 23, "IQ1_M": 29, "BF16": 30, "TQ1_0": 34, "TQ2_0": 35, "MXFP4": 39, "NVFP4": 40,
}  # fmt: skip
F32, I32 = 0, 26
MICRO_BATCH = 512
USAGE_WEIGHTS = 1
P, I64, SIZE = c.c_void_p, c.c_int64, c.c_size_t


class InitParams(c.Structure):
    _fields_ = (("mem_size", SIZE), ("mem_buffer", P), ("no_alloc", c.c_bool))


# name -> (result, arguments); the functions of ggml.h, ggml-alloc.h, ggml-backend.h and ggml-cpu.h used here
BASE = {
    "ggml_tensor_overhead": (SIZE, []), "ggml_graph_overhead": (SIZE, []), "ggml_init": (P, [InitParams]),
    "ggml_free": (None, [P]), "ggml_new_tensor_2d": (P, [P, c.c_int, I64, I64]),
    "ggml_new_tensor_3d": (P, [P, c.c_int, I64, I64, I64]), "ggml_reshape_3d": (P, [P, P, I64, I64, I64]),
    "ggml_mul_mat_id": (P, [P, P, P, P]), "ggml_swiglu_split": (P, [P, P, P]), "ggml_mul": (P, [P, P, P]),
    "ggml_view_2d": (P, [P, P, I64, I64, SIZE, SIZE]), "ggml_add": (P, [P, P, P]), "ggml_cont": (P, [P, P]),
    "ggml_set_input": (None, [P]), "ggml_set_output": (None, [P]), "ggml_new_graph": (P, [P]),
    "ggml_build_forward_expand": (None, [P, P]), "ggml_nbytes": (SIZE, [P]),
    "ggml_gallocr_new": (P, [P]), "ggml_gallocr_alloc_graph": (c.c_bool, [P, P]), "ggml_gallocr_free": (None, [P]),
    "ggml_backend_get_default_buffer_type": (P, [P]), "ggml_backend_get_device": (P, [P]),
    "ggml_backend_dev_backend_reg": (P, [P]), "ggml_backend_reg_get_proc_address": (P, [P, c.c_char_p]),
    "ggml_backend_dev_supports_op": (c.c_bool, [P, P]), "ggml_backend_alloc_ctx_tensors_from_buft": (P, [P, P]),
    "ggml_backend_buffer_set_usage": (None, [P, c.c_int]), "ggml_backend_buffer_free": (None, [P]),
    "ggml_backend_tensor_set": (None, [P, P, SIZE, SIZE]), "ggml_backend_tensor_get": (None, [P, P, SIZE, SIZE]),
    "ggml_backend_graph_compute": (c.c_int, [P, P]),
}  # fmt: skip
CPU = {"ggml_backend_cpu_init": (P, []), "ggml_backend_cpu_set_n_threads": (None, [P, c.c_int])}


def ggml(folder: str) -> Any:
    """The functions above as attributes."""

    class Functions: ...

    out = Functions()
    for file, table in (("libggml-base.so", BASE), ("libggml-cpu.so", CPU)):
        library = c.CDLL(os.path.join(folder, file), mode=c.RTLD_GLOBAL)
        for name, (result, arguments) in table.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
            setattr(out, name.removeprefix("ggml_"), function)
    return out


@dataclass
class Graph:
    context: int
    allocator: int
    graph: int
    inputs: tuple[int, int, int]  # activations, ids, weights
    result: int


class Llama(Peer):
    def __init__(self) -> None:
        self.g = ggml(os.environ["KT_PEER_GGML"])
        self.backend = self.g.backend_cpu_init()
        self.plain = self.g.backend_get_default_buffer_type(self.backend)
        self.repack = "repack" in sys.argv[2:]
        self.graphs: dict[tuple[int, int], Graph] = {}

    # ---- weights ----

    def context(self, tensors: int) -> int:
        size = self.g.tensor_overhead() * tensors + self.g.graph_overhead()
        return self.g.init(InitParams(size, None, True))

    def extra_buffer_types(self) -> list[int]:
        """ggml's repacked layouts (and AMX's, where there is one), in the order llama.cpp tries them."""
        device = self.g.backend_get_device(self.backend)
        name = b"ggml_backend_dev_get_extra_bufts"
        address = self.g.backend_reg_get_proc_address(self.g.backend_dev_backend_reg(device), name)
        if not address:
            return []
        found, listed = [], c.CFUNCTYPE(c.POINTER(P), P)(address)(device)
        while listed and listed[len(found)]:
            found.append(listed[len(found)])
        return found

    def takes(self, kind: int, type_id: int, cols: int, rows: int) -> bool:
        """Whether mul_mat_id runs on a weight of this size in buffers of type `kind`; asked as llama.cpp asks."""
        context = self.context(8)
        weight = self.g.new_tensor_3d(context, type_id, cols, rows, 2)
        buffer = self.g.backend_alloc_ctx_tensors_from_buft(context, kind)
        inputs = self.context(8)
        x, ids = self.g.new_tensor_3d(inputs, F32, cols, 1, 1), self.g.new_tensor_2d(inputs, I32, 2, 1)
        node = self.g.mul_mat_id(inputs, weight, x, ids)
        answer = self.g.backend_dev_supports_op(self.g.backend_get_device(self.backend), node)
        self.g.free(inputs)
        self.g.backend_buffer_free(buffer)
        self.g.free(context)
        return answer

    def buffer_type(self, work: Work, role: str) -> int:
        rows, cols = work.size(role)
        if self.repack:
            for kind in self.extra_buffer_types():
                if self.takes(kind, TYPE_IDS[work.type], cols, rows):
                    return kind
        return self.plain

    def load(self, work: Work) -> str:
        if work.type not in GGUF:
            raise Missing("reads GGUF types only")
        kinds = {role: self.buffer_type(work, role) for role in ROLES}
        if self.repack and all(kind == self.plain for kind in kinds.values()):
            raise Missing("no repacked layout of this type on this processor")
        self.g.backend_cpu_set_n_threads(self.backend, work.threads)
        self.work = work
        self.weights: list[dict[str, int]] = [{} for _ in range(work.layers)]
        for role in ROLES:
            rows, cols = work.size(role)
            some = [t["raw"].reshape(-1).view(np.uint8) for t in work.tensors[role]]
            whole = np.concatenate([some[e % len(some)] for e in range(work.experts)])
            for layer in self.weights:
                context = self.context(1)  # a buffer holds one tensor, so that each role may have its layout
                tensor = self.g.new_tensor_3d(context, TYPE_IDS[work.type], cols, rows, work.experts)
                if self.g.nbytes(tensor) != whole.nbytes:
                    raise Missing(f"{work.type} has {self.g.nbytes(tensor)} bytes there, {whole.nbytes} here")
                buffer = self.g.backend_alloc_ctx_tensors_from_buft(context, kinds[role])
                self.g.backend_buffer_set_usage(buffer, USAGE_WEIGHTS)
                self.g.backend_tensor_set(tensor, whole.ctypes.data, 0, whole.nbytes)
                layer[role] = tensor
        return "repacked" if self.repack else "plain"

    # ---- graphs ----

    def graph(self, layer: int, tokens: int) -> Graph:
        key = (layer, tokens)
        if key not in self.graphs:
            self.graphs[key] = self.build(self.weights[layer], tokens)
        return self.graphs[key]

    def build(self, weights: dict[str, int], tokens: int) -> Graph:
        g, hidden, k = self.g, self.work.hidden, self.work.per_token
        context = self.context(32 + 4 * k)
        x = g.new_tensor_2d(context, F32, hidden, tokens)
        ids = g.new_tensor_2d(context, I32, k, tokens)
        share = g.new_tensor_3d(context, F32, 1, k, tokens)
        for tensor in (x, ids, share):
            g.set_input(tensor)
        each = g.reshape_3d(context, x, hidden, 1, tokens)
        up = g.mul_mat_id(context, weights["up"], each, ids)
        gate = g.mul_mat_id(context, weights["gate"], each, ids)
        experts = g.mul_mat_id(context, weights["down"], g.swiglu_split(context, gate, up), ids)
        experts = g.mul(context, experts, share)  # [H, K, T]
        row = hidden * 4
        total = g.view_2d(context, experts, hidden, tokens, row * k, 0)
        for i in range(1, k):
            total = g.add(context, total, g.view_2d(context, experts, hidden, tokens, row * k, row * i))
        if k == 1:
            total = g.cont(context, total)
        g.set_output(total)
        graph = g.new_graph(context)
        g.build_forward_expand(graph, total)
        allocator = g.gallocr_new(self.plain)
        if not g.gallocr_alloc_graph(allocator, graph):
            raise MemoryError(f"ggml's graph of {tokens} tokens")
        return Graph(context, allocator, graph, (x, ids, share), total)

    def prepare(self, case: Case) -> str:
        for old in self.graphs.values():
            self.g.gallocr_free(old.allocator)
            self.g.free(old.context)
        self.graphs = {}
        self.hidden = np.ascontiguousarray(case.hidden)
        self.draws = [(i.astype(np.int32), np.ascontiguousarray(w)) for i, w in case.draws]
        self.out = np.empty_like(self.hidden)
        return ""

    def call(self, layer: int, draw: int) -> None:
        ids, weights = self.draws[draw]
        for start in range(0, len(ids), MICRO_BATCH):
            part = slice(start, start + MICRO_BATCH)
            graph = self.graph(layer, len(ids[part]))
            for tensor, array in zip(graph.inputs, (self.hidden[part], ids[part], weights[part]), strict=True):
                self.g.backend_tensor_set(tensor, array.ctypes.data, 0, array.nbytes)
            if self.g.backend_graph_compute(self.backend, graph.graph):
                raise RuntimeError("ggml_backend_graph_compute failed")
            out = self.out[part]
            self.g.backend_tensor_get(graph.result, out.ctypes.data, 0, out.nbytes)

    def output(self) -> np.ndarray:
        return self.out


if __name__ == "__main__":
    serve(Llama)
