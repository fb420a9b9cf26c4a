"""Tiny random models of the five families, and hand-made files, for the tests of the loaders and of quantize.

Weights are exact in bfloat16, so F32, BF16 and safetensors checkpoints of one model hold the same numbers.
"""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

_BASE = dict(
    hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=2, vocab_size=80,
    num_attention_heads=4, num_key_value_heads=2, num_experts_per_tok=2, max_position_embeddings=128,
)  # fmt: skip
_MLA = dict(
    num_key_value_heads=4, n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1, kv_lora_rank=32,
    qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=24,
)  # fmt: skip

CONFIGS: dict[str, dict] = {
    "deepseek_v2": _BASE | _MLA | dict(q_lora_rank=None, topk_method="greedy"),
    "deepseek_v3": _BASE | _MLA | dict(q_lora_rank=48, n_group=2, topk_group=1),
    "qwen2_moe": _BASE | dict(num_experts=4, shared_expert_intermediate_size=64, mlp_only_layers=[0]),
    "qwen3_moe": _BASE | dict(num_experts=4, head_dim=32),
    "mixtral": _BASE | dict(num_local_experts=4),
}
FAMILIES = list(CONFIGS)


def config(model_type: str, **changes):
    return AutoConfig.for_model(model_type, **(CONFIGS[model_type] | changes))


def model(model_type: str, **changes):
    """A random model whose every weight, biases and norms included, is distinct from its neighbours."""
    torch.manual_seed(sum(map(ord, model_type)))
    built = AutoModelForCausalLM.from_config(config(model_type, **changes))
    with torch.no_grad():
        for tensor in built.state_dict().values():
            tensor.copy_((torch.randn(tensor.shape) * 0.1).bfloat16())
    return built


def meta(model_type: str, **changes):
    """The same architecture without memory, as optimize_and_load builds it."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config(model_type, **changes))


def expected(built) -> dict[str, tuple[int, ...]]:
    """What a load needs: the state dict's names and shapes, tied names removed."""
    tied = built._tied_weights_keys if built.config.tie_word_embeddings else {}
    return {name: tuple(t.shape) for name, t in built.state_dict().items() if name not in tied}


def write_safetensors(
    path: Path, tensors: dict[str, tuple[str, list[int], bytes]], header: bytes | None = None
) -> Path:
    """A safetensors file from raw bytes, written without the library so that it may be wrong on purpose."""
    entries, data = {}, b""
    for name, (dtype, shape, raw) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    header = json.dumps(entries).encode() if header is None else header
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


Edit = Callable[[str, np.ndarray, gguf.GGMLQuantizationType], list[tuple] | None]


def edit_gguf(
    source: Path,
    target: Path,
    edit: Edit | None = None,
    metadata: dict | None = None,
    arch: str | None = None,
) -> Path:
    """Copy a GGUF file with the gguf package, tensors and metadata changed on the way.

    `edit(name, data, type)` returns what to write for a tensor: [(name, float array)], or [(name, bytes, type)], or
    None to keep it.
    `metadata` replaces values of existing keys (after the architecture).
    """
    reader = gguf.GGUFReader(source)
    old_arch = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, arch or old_arch)
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        short = key.removeprefix(f"{old_arch}.")
        value = (metadata or {}).get(short, field.contents())
        sub = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(key.replace(f"{old_arch}.", f"{writer.arch}."), value, field.types[0], sub)
    for tensor in reader.tensors:
        changed = edit(tensor.name, tensor.data, tensor.tensor_type) if edit else None
        if changed is None:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        for name, data, *kind in changed or []:
            writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=kind[0] if kind else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
