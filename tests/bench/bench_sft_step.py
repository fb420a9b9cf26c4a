"""A whole training step beside transformers and PEFT: `make bench-sft`.

Eight layers with the sizes of Qwen3-30B-A3B, random weights: ours from a Q4_K_M GGUF, theirs dense in bf16 and in fp32.
One LoRA of the same rank on every linear layer and the experts, AdamW, layers computed again in the backward, one
sequence. Each model is trained in a process of its own, so that its peak memory is its own; the first step is not
counted. The engines take turns, ours before and after each of theirs, and a ratio is taken inside such a turn.
`--inside`: ours without adapters in the experts as well, for what those cost.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def ours(folder: Path) -> Any:
    from transformers import AutoConfig

    from ktransformers import optimize_and_load
    from ktransformers.configs import meta_model

    net = meta_model(AutoConfig.from_pretrained(folder))
    return optimize_and_load(net, "Qwen3-MoE", next(folder.glob("*.gguf")), devices={"cuda": "cpu"}, progress=False)


def theirs(folder: Path, dtype: str) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        net = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    net.to_empty(device="cpu")
    noise = torch.randn(1 << 20) * 0.02
    for parameter in net.parameters():
        flat = parameter.data.view(-1)
        for start in range(0, flat.numel(), len(noise)):
            part = flat[start : start + len(noise)]
            part.copy_(noise[: len(part)])
    net.model.rotary_emb.__init__(config)  # its buffers were empty
    return net


def child(arguments: argparse.Namespace) -> None:
    """Train `steps` steps and print their seconds and the process' peak memory in bytes."""
    import torch
    from peft import LoraConfig, get_peft_model

    from ktransformers.machine.system import peak_memory

    torch.manual_seed(0)
    net = ours(arguments.folder) if arguments.child.startswith("ours") else theirs(arguments.folder, arguments.child)
    inside = [] if arguments.child == "ours outside" else EXPERTS
    net = get_peft_model(net, LoraConfig(r=arguments.rank, target_modules=LINEARS, target_parameters=inside or None))
    net.gradient_checkpointing_enable({"use_reentrant": False})
    net.enable_input_require_grads()
    net.train()
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], fused=True)
    seconds = []
    for _ in range(arguments.steps + 1):
        ids = torch.randint(0, 32000, (1, arguments.tokens))
        begun = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        net(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - begun)
    print(json.dumps({"seconds": seconds[1:], "peak": peak_memory()}))


def run(who: str, arguments: argparse.Namespace, steps: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.bench.bench_sft_step", "--child", who, "--folder", str(arguments.folder)]
    command += ["--steps", str(steps), "--tokens", str(arguments.tokens), "--rank", str(arguments.rank)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return {"seconds": [], "peak": 0}  # most often memory; its own message is on the screen
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="a synthetic model that is there already; default: a new one")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dtypes", default="bfloat16,float32", help='of theirs, or ""')
    parser.add_argument("--inside", action="store_true", help="what adapters inside experts cost")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4, help="of ours in a turn; theirs do one")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write every figure here")
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments)
    with tempfile.TemporaryDirectory() as made:
        if arguments.folder is None:
            from tests.bench.bench_model import write_synthetic

            arguments.folder = Path(made)
            write_synthetic(arguments.folder)
        compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    from ktransformers import native

    others = [name for name in arguments.dtypes.split(",") if name] + (["ours outside"] if arguments.inside else [])
    table = Table("", "s a step", "tokens/s", "ours is faster by", "peak GiB", "of ours")
    found = []
    for other in others:
        ratios, ours_took, their_took, peaks = [], [], [], [0, 0]
        for _ in range(arguments.turns):
            steps = arguments.steps if other == "ours outside" else 1
            turn = [run("ours", arguments, arguments.steps), run(other, arguments, steps), run("ours", arguments, arguments.steps)]
            mine = turn[0]["seconds"] + turn[2]["seconds"]
            ours_took += mine
            their_took += turn[1]["seconds"]
            peaks = [max(peaks[0], turn[0]["peak"], turn[2]["peak"]), max(peaks[1], turn[1]["peak"])]
            if turn[1]["seconds"]:
                ratios.append(statistics.median(turn[1]["seconds"]) / statistics.median(mine))
        for name, took, peak in (("ours", ours_took, peaks[0]), (other, their_took, peaks[1])):
            second = statistics.median(took) if took else float("nan")
            ratio = f"{statistics.median(ratios):.2f}" if name == other and ratios else ""
            share = f"{peak / peaks[0]:.2f}" if name == other else ""
            table.add_row(name, f"{second:.2f}", f"{arguments.tokens / second:.1f}", ratio, f"{peak / 2**30:.2f}", share)
            found.append({"engine": name, "seconds": took, "peak": peak, "tokens": arguments.tokens, "rank": arguments.rank})
    Console(width=110).print(table, f"{native.threads()} threads, {native.isa()}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
