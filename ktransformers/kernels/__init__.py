"""Kernels for GPUs: packed weights in one plain layout (`words`) and Triton kernels over it, each beside its reference.

words, parts       the layout, and how each published format becomes it
gemv, dot, dequantize, linear    products with few, some and many rows, and the choice between them
experts            routed experts, for one token and for many
decoding, triton   what the kernels share; the door to Triton, which need not be installed

Importing this package imports torch only: Triton comes with the first kernel that is launched.
"""
