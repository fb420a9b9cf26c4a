"""What a program is taken to reach on a GPU: every assumption of speed.py about GPUs, each with its reason.

None of it was measured on a GPU, so plans call what follows from it an estimate. What the kernels are compiled to is
counted in tests/bench/KERNELS.md; here is what that leads one to expect, and what they are built to reach.
"""

from ktransformers.planner.sizes import DENSE

ESTIMATE = "estimate (not measured on a GPU)"
"""What a plan calls the speed of a machine that has one."""

PUBLISHED_BANDWIDTH, PUBLISHED_PEAK = 0.9, 0.75
"""Of published figures what a long copy and a large product of matrices reach; figures measured here count whole."""

READ = {"matrix": 0.70, "experts": 0.60, DENSE: 0.80, "attention": 0.70}
"""Of the bandwidth, for few tokens.

Packed matrices and experts: what their kernels are built to reach. The loop over a matrix is 4 to 7 instructions a
weight: consumer cards issue several times what their memory gives, an A100 as much, an H200 85 % of it for Q4_K and
less than half for Q2_K. An expert is small, and its launch ends with few blocks busy. Dense: torch's products with a
vector. Attention: the page table is read and shares are added up beside the keys."""

PRODUCT = {"matrix": 0.95, "experts": 0.40, DENSE: 0.95, "attention": 0.40, "attention of one token": 0.70}
"""Of a large product's rate, for many tokens.

Dense: prompts are narrower than a large product. Packed matrices: numbers are made first, then it is the same.
Experts: codes become numbers once for every 64 rows, 8 to 10 instructions a weight; that alone takes an H100 to half of
its peak. Attention: fused softmax takes the rest."""

MADE = 4.0
"""Bytes a weight that a packed matrix costs beside its own for many tokens: bf16 numbers are written and read again."""
MADE_FROM = 128
"""Tokens beyond which numbers are made, DOT_ROWS of kernels/linear.py; a test holds them together."""

KERNELS = 12
"""Kernels of a layer for a few tokens, where its weights are packed: what lies between products is fused."""
GAP, LAUNCH = 1.5e-6, 2.5e-5
"""Seconds that a kernel costs beside its work: in a replayed graph until the next one starts, else in Python."""
REPLAY = 5e-5
"""Seconds of a replay beside its kernels: a launch, two numbers copied up, a wait for the logits."""
DENSE_LAYER = 5e-4
"""Seconds of Python and launches for a layer of dense weights without a graph: about what transformers' own take."""
DENSE_EXPERTS = 1e-4
"""Seconds for a layer's dense experts beside their work: sorting tokens, a launch for each expert, a wait."""
COPY = 2e-5
"""Seconds that a copy between RAM and a GPU takes beside its bytes: starting it, and waiting for its end; in a graph
the hand-over to the threads of the CPU and back."""
