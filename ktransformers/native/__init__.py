"""The border to the C library (native/include/kt_native.h): the only folder that knows ffi and lib.

It checks tensors, passes pointers and turns status codes into exceptions; it computes nothing. Importing it
starts no thread and works without the library being built: the first use then says what to do. The GIL is
released inside every C call, and calls from several threads on the one pool wait for each other.

Letters: T tokens, H hidden, I intermediate, E experts, K experts per token.
"""

from ktransformers.native.argmax import argmax
from ktransformers.native.attention import attend
from ktransformers.native.block import Block
from ktransformers.native.checks import MAX_THREADS
from ktransformers.native.decode import Decode
from ktransformers.native.delta_net import DeltaNet
from ktransformers.native.embedding import Embedding
from ktransformers.native.encode import encode, encoded_types
from ktransformers.native.experts import ACTIVATIONS, Experts, Glu
from ktransformers.native.latent_attention import LatentAttention
from ktransformers.native.layers import Joining, Layer, Layers, Norm
from ktransformers.native.library import (
    NOT_BUILT,
    Pool,
    available,
    bench_peak,
    bench_read,
    cpu_features,
    default_threads,
    isa,
    isa_needs,
    isas,
    nodes,
    scratch_bytes,
    set_exact,
    set_isa,
    set_panel_threshold,
    set_threads,
    threads,
)
from ktransformers.native.linear import Linear
from ktransformers.native.queue import HostCall, Queue
from ktransformers.native.router import Choice, Router
from ktransformers.native.self_attention import Attention
from ktransformers.native.weights import SCALED_TYPES, SCALES, SUPPORTED_TYPES, dequantize

__all__ = [
    "ACTIVATIONS",
    "MAX_THREADS",
    "NOT_BUILT",
    "SCALED_TYPES",
    "SCALES",
    "SUPPORTED_TYPES",
    "Attention",
    "Block",
    "Choice",
    "Decode",
    "DeltaNet",
    "Embedding",
    "Experts",
    "Glu",
    "HostCall",
    "Joining",
    "LatentAttention",
    "Layer",
    "Layers",
    "Linear",
    "Norm",
    "Pool",
    "Queue",
    "Router",
    "argmax",
    "attend",
    "available",
    "bench_peak",
    "bench_read",
    "cpu_features",
    "default_threads",
    "dequantize",
    "encode",
    "encoded_types",
    "isa",
    "isa_needs",
    "isas",
    "nodes",
    "scratch_bytes",
    "set_exact",
    "set_isa",
    "set_panel_threshold",
    "set_threads",
    "threads",
]
