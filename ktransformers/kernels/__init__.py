"""Kernels for GPUs: packed weights in one plain layout (`words`) and Triton kernels over it, each beside its reference.

layouts, words, parts    the packed form of each published format, and how a weight becomes it
gemv, dot, dequantize, linear    products with few, some and many rows, and the choice between them
experts                  routed experts: with grouping, gating, combining
decoding, compiler       what the kernels share; the door to Triton, which need not be installed

Everything imports without Triton; layouts and words never import it.
"""
