"""What llama.cpp's converter does to tensors, each step with its way back: the loader undoes what the writer does.

A layout says in how many parts and in which order a GGUF file holds one tensor of the model. Which tensor of which
family has one is told by gguf_names.py; reading and writing files is for bind_gguf.py and gguf_files/write.py.
Letters: h heads, k key heads, v value heads for one of them, d size of a head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Config = Any
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """One tensor of the model as a file has it.

    `parts`: the last word of each part's name, in place of the word that the whole has; () for one part.
    `store` makes the parts; it must work on the meta device, where it tells their shapes. `load` is the way back.
    `rows`: the file's row i is the model's row `rows(shape, config)[i]`; None where more than rows moves.
    `exact`: numbers only move. Where they change, they change in float32.
    `columns`: not rows but columns move.
    """

    store: Callable[[Tensor, Config], list[Tensor]]
    load: Callable[[list[Tensor], Shape, Config], Tensor]
    parts: tuple[str, ...] = ()
    rows: Callable[[Shape, Config], Tensor] | None = None
    exact: bool = True
    columns: bool = False

    def shapes(self, shape: Shape, config: Config) -> list[Shape]:
        """The shapes of the parts."""
        return [tuple(part.shape) for part in self.store(torch.empty(shape, device="meta"), config)]


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _moved(
    rows: Callable[[Shape, Config], Tensor],
    to: Callable[[Tensor], Tensor] = _same,
    back: Callable[[Tensor], Tensor] = _same,
) -> Layout:
    """Rows in another order, and perhaps another function of the numbers."""

    def store(tensor: Tensor, config: Config) -> list[Tensor]:
        return [to(tensor)[rows(tuple(tensor.shape), config)]]

    def load(parts: list[Tensor], shape: Shape, config: Config) -> Tensor:
        out = torch.empty(shape, dtype=parts[0].dtype, device=parts[0].device)
        out[rows(shape, config)] = back(parts[0]).view(shape)
        return out

    exact = to is _same
    return Layout(store, load, rows=rows if exact else None, exact=exact)


def _changed(to: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Layout:
    """Another function of the numbers, each in its place."""
    return Layout(lambda t, _: [to(t)], lambda parts, shape, _: back(parts[0]).view(shape), exact=False)


def _minus_exp(log: Tensor) -> Tensor:
    return -log.exp()


def _log_minus(stored: Tensor) -> Tensor:
    return (-stored).log()


PLUS_ONE = _changed(lambda t: t + 1, lambda t: t - 1)
"""A norm whose model multiplies by 1 + weight."""

MINUS_EXP = _changed(_minus_exp, _log_minus)
"""`A_log` of a state space."""

MINUS_EXP_COLUMN = _changed(lambda t: _minus_exp(t).unsqueeze(-1), _log_minus)
COLUMN = Layout(lambda t, _: [t.unsqueeze(-1)], lambda parts, shape, _: parts[0].view(shape))
"""Mamba 2 has one number for a head, and the file one row for it."""

GROUPS = Layout(
    lambda t, config: [t.view(getattr(config, "mamba_n_groups", None) or config.n_groups, -1)],
    lambda parts, shape, _: parts[0].view(shape),
)
"""Mamba 2's norm, a row for each group."""


# --- order of rows ------------------------------------------------------------------------------------------


def _rope_pairs(shape: Shape, heads: int) -> Tensor:
    """Rows (head, half, pair) in the order (head, pair, half), which llama.cpp's first RoPE takes."""
    if shape[0] % (2 * heads):
        raise ValueError(f"{shape[0]} rows for {heads} heads")
    return torch.arange(shape[0], device="cpu").view(heads, 2, -1).transpose(1, 2).reshape(-1)


ROPE_Q = _moved(lambda shape, config: _rope_pairs(shape, config.num_attention_heads))
ROPE_K = _moved(lambda shape, config: _rope_pairs(shape, config.num_key_value_heads))


def _value_heads(count: int, config: Config, size: int) -> Tensor:
    """The last k·v·size of `count` rows, (k, v, size), in the order (v, k, size); what stands before stays."""
    k = config.linear_num_key_heads
    v = config.linear_num_value_heads // k
    moved = torch.arange(k * v * size, device="cpu").view(k, v, size).transpose(0, 1).reshape(-1)
    first = count - len(moved)
    return torch.cat([torch.arange(first, device="cpu"), moved + first])


VALUES = _moved(lambda shape, config: _value_heads(shape[0], config, config.linear_value_head_dim))
"""Rows of value heads, perhaps after those of queries and keys."""

VALUE_SCALARS = _moved(lambda shape, config: _value_heads(shape[0], config, 1))
"""One row for each value head."""

VALUE_DECAYS = _moved(lambda shape, config: _value_heads(shape[0], config, 1), _minus_exp, _log_minus)

VALUE_COLUMNS = Layout(
    lambda t, config: [t[:, _value_heads(t.shape[1], config, config.linear_value_head_dim)]],
    lambda parts, shape, config: VALUES.load([parts[0].view(shape).T], (shape[1], shape[0]), config).T.contiguous(),
    columns=True,
)
"""Columns of value heads."""


# --- one tensor in several parts ------------------------------------------------------------------------------


def _rows_apart(*parts: str, interleaved: bool = False, dim: int = 0) -> Layout:
    """Equal halves or thirds, one below the other or, `interleaved`, in turn."""
    n = len(parts)

    def store(tensor: Tensor, config: Config) -> list[Tensor]:
        if interleaved:
            return list(tensor.unflatten(dim, (-1, n)).unbind(dim + 1))
        return list(tensor.chunk(n, dim))

    def load(stored: list[Tensor], shape: Shape, config: Config) -> Tensor:
        size = (*shape[:dim], shape[dim] // n, *shape[dim + 1 :])
        stored = [part.view(size) for part in stored]
        return torch.stack(stored, dim + 1).view(shape) if interleaved else torch.cat(stored, dim)

    return Layout(store, load, parts)


GATE_AND_UP_SHARED = _rows_apart("ffn_gate_shexp", "ffn_up_shexp")
QKV_CONVOLUTIONS = _rows_apart("ssm_conv1d_q", "ssm_conv1d_k", "ssm_conv1d_v")
EXPERT_BIASES = _rows_apart("ffn_gate_exps", "ffn_up_exps", dim=1)
EXPERT_BIASES_IN_TURN = _rows_apart("ffn_gate_exps", "ffn_up_exps", dim=1, interleaved=True)


def _kv_b_sizes(shape: Shape, config: Config) -> tuple[int, list[int]]:
    value = config.v_head_dim
    return config.num_attention_heads, [shape[0] // config.num_attention_heads - value, value]


def _store_kv_b(tensor: Tensor, config: Config) -> list[Tensor]:
    heads, sizes = _kv_b_sizes(tensor.shape, config)
    k_b, v_b = tensor.view(heads, sum(sizes), -1).split(sizes, 1)
    return [k_b.transpose(1, 2), v_b]


def _load_kv_b(parts: list[Tensor], shape: Shape, config: Config) -> Tensor:
    heads, (nope, value) = _kv_b_sizes(shape, config)
    out = torch.empty(heads, nope + value, shape[1], dtype=parts[0].dtype, device=parts[0].device)
    out[:, :nope] = parts[0].view(heads, shape[1], nope).transpose(1, 2)
    out[:, nope:] = parts[1].view(heads, value, shape[1])
    return out.view(shape)


KV_B = Layout(_store_kv_b, _load_kv_b, ("attn_k_b", "attn_v_b"))
"""`kv_b_proj` [h (nope + value), lora], split to absorb attention: k_b [h, lora, nope] and v_b [h, value, lora]. Older
files hold it whole, or flatten the first two dimensions of the parts."""


def _qkvz_sizes(config: Config) -> tuple[int, list[int]]:
    """Key heads, and the rows of q, k, v and z that each of them has."""
    k = config.linear_num_key_heads
    values = config.linear_num_value_heads // k * config.linear_value_head_dim
    return k, [config.linear_key_head_dim] * 2 + [values] * 2


def _store_qkvz(tensor: Tensor, config: Config) -> list[Tensor]:
    k, sizes = _qkvz_sizes(config)
    parts = [part.flatten(0, 1) for part in tensor.view(k, sum(sizes), -1).split(sizes, 1)]
    return [torch.cat(parts[:3]), parts[3]]


def _load_qkvz(parts: list[Tensor], shape: Shape, config: Config) -> Tensor:
    k, sizes = _qkvz_sizes(config)
    qkv = parts[0].view(-1, shape[1]).split([k * size for size in sizes[:3]])
    return torch.cat([p.reshape(k, -1, shape[1]) for p in (*qkv, parts[1])], 1).view(shape)


QKVZ = Layout(_store_qkvz, _load_qkvz, ("attn_qkv", "attn_gate"))
"""`in_proj_qkvz`, head by head in the model; all q, k and v in one part and z in the other."""
