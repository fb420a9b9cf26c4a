"""What `kt plan` predicts against what is measured: `make bench-plan`.

Synthetic models of 0.7 to 2.3 GB in three formats (random weights: only speed and memory mean anything). Each is planned
from its headers with this machine measured, then runs in a process of its own. Goals: speeds within 25 %, memory
within 5 %.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from tests.bench.bench_model import SYNTHETIC, run, write_synthetic

PROMPT, COUNT = 512, 64
MIXTRAL = dict(
    vocab_size=32000, hidden_size=2048, num_hidden_layers=4, num_attention_heads=16, num_key_value_heads=4, head_dim=128,
    intermediate_size=3584, num_local_experts=8, num_experts_per_tok=2, tie_word_embeddings=False, dtype="bfloat16",
)  # fmt: skip
DEEPSEEK = dict(
    vocab_size=32000, hidden_size=2048, num_hidden_layers=5, num_attention_heads=16, num_key_value_heads=16,
    intermediate_size=8192, moe_intermediate_size=704, n_routed_experts=48, num_experts_per_tok=6, n_shared_experts=2,
    n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128,
    qk_rope_head_dim=64, v_head_dim=128, head_dim=64, tie_word_embeddings=False, dtype="bfloat16",
)  # fmt: skip


def write_safetensors(folder: Path, model_type: str, sizes: dict) -> Path:
    """Write a BF16 folder of random weights; returns it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model = model.to_empty(device="cpu").bfloat16()
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    model.save_pretrained(folder)
    return folder


MODELS = {
    "Qwen3-MoE, Q4_K_M": lambda folder: write_synthetic(folder, "qwen3_moe", SYNTHETIC, "Q4_K_M"),
    "Mixtral, Q8_0": lambda folder: write_synthetic(folder, "mixtral", MIXTRAL, "Q8_0"),
    "DeepSeek-V2, BF16": lambda folder: write_safetensors(folder, "deepseek_v2", DEEPSEEK),
}


def compare(folder: Path, weights: Path, rule: str) -> dict[str, Any]:
    """Plan, run, plan again (the machine's speed moves): predicted and measured figures of one model."""
    from ktransformers.machine import hardware
    from ktransformers.planner import plan as planning

    planner = planning.Planner(str(folder), weights)
    request = planning.Request(context=PROMPT + COUNT)

    def plan() -> planning.Plan:
        machine = hardware.measure()
        return planner.plan(machine, request, planner.probes(machine, here=True))

    before, measured, after = plan(), run([str(folder), str(weights), rule, str(PROMPT), str(COUNT)]), plan()

    def mean(pick) -> float:
        return statistics.mean(pick(found) for found in (before, after))

    return {
        "bytes": sum(file.stat().st_size for file in ([weights] if weights.is_file() else weights.glob("*.safetensors"))),
        "prefill": {"predicted": mean(lambda p: p.prefill.rate), "measured": measured["prefill_tokens_s"]},
        "decode": {"predicted": mean(lambda p: p.decode.rate), "measured": measured["decode_tokens_s"]},
        "memory": {"predicted": before.memory["cpu"].total / 2**20, "measured": measured["peak_rss_mb"]},
        "bandwidth": [found.hardware.cpu.read_bandwidth / 1e9 for found in (before, after)],
        "seconds": {f"{what} on {device}": value for (device, what), value in before.decode.seconds.items()},
        "prefill_seconds": {f"{what} on {device}": value for (device, what), value in before.prefill.seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write every figure there")
    parser.add_argument("--models", type=lambda text: text.split("/"), default=list(MODELS), help="names, separated by /")
    parser.add_argument("--folder", help="keep the synthetic models there")
    options = parser.parse_args()
    from rich.console import Console
    from rich.table import Table

    rules = {"Qwen3-MoE": "Qwen3-MoE", "Mixtral": "Mixtral", "DeepSeek-V2": "DeepSeek-V2"}
    table = Table(title=f"Predicted against measured, prompt {PROMPT}, {COUNT} tokens")
    for column in ("model", "GB", "", "predicted", "measured", "off"):
        table.add_column(column, justify="left" if column in ("model", "") else "right")
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.models:
            folder = Path(options.folder or temporary) / name.replace(", ", "-").replace(" ", "-")
            folder.mkdir(parents=True, exist_ok=True)
            weights = next(iter([*folder.glob("*.gguf"), *([folder] if any(folder.glob("*.safetensors")) else [])]), None)
            weights = weights or MODELS[name](folder)
            found[name] = compare(folder, weights, rules[name.partition(",")[0]])
            for what, unit in (("prefill", "tokens/s"), ("decode", "tokens/s"), ("memory", "MiB")):
                predicted, measured = found[name][what]["predicted"], found[name][what]["measured"]
                table.add_row(name, f"{found[name]['bytes'] / 1e9:.2f}", f"{what}, {unit}", f"{predicted:.1f}",
                              f"{measured:.1f}", f"{100 * (predicted / measured - 1):+.0f} %")  # fmt: skip
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
