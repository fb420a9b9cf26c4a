"""Kernels for GPUs in Triton: packed weights in one plain layout (`words`), attention over pages, what lies between.
Each stands beside its torch reference.

layouts, words, parts, floats    the packed form of each published format and of floats, and how a weight becomes it
gemv, dot, dequantize, linear    products with few, some and many rows, and the choice between them
experts                  routed experts: with grouping, gating, combining
context, mla_decode, gqa_decode    attention of new tokens over paged caches, cut along the context
cache, keep              new tokens into the pages; the same with their norms and positions
norm, rotary, router, swiglu    a launch each
decoding, compiler       what the kernels share; the door to Triton, which need not be installed

Everything imports without Triton; layouts and words never import it.
"""
