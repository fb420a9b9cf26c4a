"""Whole models beside llama.cpp, from the same GGUF: `make bench-whole`.

Prefill, decode and batches of models with the layer sizes of Qwen3-30B-A3B and DeepSeek-V2-Lite, eight layers of random
weights, or all 48 of the former with an eighth of its experts. Each engine is a process of its own with the file open;
they take turns in short slices, the other one stopped, and the read bandwidth is probed before each pair. Ratios are
taken inside a pair; shared machines change from minute to minute, so quote ratios and shares. The share is (bytes that a
token must read) / time / bandwidth, of weights alone.
"""

import argparse
import json
import os
import pathlib
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from tests.bench.bench_model import SYNTHETIC, write_synthetic
from tests.bench.peers import environment

DEEPSEEK = dict(
    vocab_size=32000, hidden_size=2048, num_hidden_layers=8, num_attention_heads=16, num_key_value_heads=16,
    intermediate_size=10944, moe_intermediate_size=1408, n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6,
    first_k_dense_replace=1, kv_lora_rank=512, q_lora_rank=None, qk_rope_head_dim=64, qk_nope_head_dim=128,
    v_head_dim=128, norm_topk_prob=False, scoring_func="softmax", topk_method="greedy", n_group=1, topk_group=1,
    tie_word_embeddings=False, dtype="bfloat16",
)  # fmt: skip
DEEP = dict(SYNTHETIC, num_hidden_layers=48, num_experts=16)  # all layers of Qwen3-30B-A3B, an eighth of its experts
MODELS = {
    "qwen3moe-8L": ("qwen3_moe", SYNTHETIC, "MoE"), "deepseek2-8L": ("deepseek_v2", DEEPSEEK, "MLA"),
    "qwen3moe-48L": ("qwen3_moe", DEEP, "MoE"),
}  # fmt: skip
TOKENS = 8  # a slice of decoding
ENV = {"ours": {"OMP_WAIT_POLICY": "passive"}}  # as `kt` sets it; llama.cpp computes on OpenMP's threads, which shall spin
LONG = 4096  # tokens from which three slices have to do
BATCH_DEPTH = 128  # tokens that the first sequence of a batch begins with
CAPTION = (
    "tokens/s, medians over slices, and the spread (10 to 90 %) of the ratio ours / llama.cpp inside a pair of slices; "
    "share: of the read bandwidth probed around it, weights alone. llama.cpp: flash attention as named, its own repacking on."
)


class Engine:
    """One engine in a process of its own: `tests/bench/whole_<name>.py`, asked by lines of JSON."""

    def __init__(self, name: str, python: str, arguments: list[str]) -> None:
        self.name = name
        inherited = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
        script = pathlib.Path(__file__).with_name(f"whole_{name}.py")
        self.process = subprocess.Popen(
            [python, str(script), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=environment.ROOT, env={**inherited, "PYTHONPATH": str(environment.ROOT), **ENV.get(name, {})},
        )  # fmt: skip

    def ask(self, **request: Any) -> Any:
        """The answer to a request; the process runs meanwhile only."""
        self.process.send_signal(signal.SIGCONT)
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise SystemExit(f"{self.name}: ended with status {self.process.wait()} at {request}")
        self.process.send_signal(signal.SIGSTOP)
        return json.loads(line)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def bandwidth() -> float:
    """Bytes a second that all threads read, of memory that no cache holds."""
    from ktransformers import native

    start = time.perf_counter()
    native.bench_read(_probe())
    return _probe().numel() / (time.perf_counter() - start)


def _probe() -> Any:
    import torch

    if not hasattr(_probe, "data"):
        _probe.data = torch.ones(1 << 29, dtype=torch.uint8)
    return _probe.data


def touched_bytes(path: pathlib.Path, config: dict) -> float:
    """Bytes of weights that one token reads: all but the embedding table and the experts it does not choose."""
    from ktransformers.loaders import open_weights

    files, total = open_weights(path), 0.0
    chosen = config["num_experts_per_tok"] / (config.get("num_experts") or config["n_routed_experts"])
    for name in files.names():
        size = files.info(name).nbytes
        total += 0 if "token_embd" in name else size * (chosen if "_exps" in name else 1.0)
    files.close()
    return total


def measure(engines: list[Engine], work: str, size: int, slices: int, touched: float) -> dict:
    """A row: `size` is the length of a prompt, the depth of decoding, or the sequences of a batch."""
    request = {"op": work, "tokens": size}
    if work == "batch":
        request = {"op": work, "sequences": size, "tokens": BATCH_DEPTH}
    for engine in engines:
        engine.ask(**request, count=1)  # at that depth, and warm
    pairs = []
    for _ in range(slices):
        pair = {"bandwidth": bandwidth()}
        for engine in engines:
            times = engine.ask(**request, count=1 if work == "prefill" else TOKENS)
            pair[engine.name] = (1 if work == "decode" else size) / statistics.median(times)
        pairs.append(pair)
    return _row(work, size, engines, pairs, touched)


def _row(work: str, size: int, engines: list[Engine], pairs: list[dict], touched: float) -> dict:
    row: dict[str, Any] = {"work": work, "tokens": size}
    for engine in engines:
        row[engine.name] = statistics.median(pair[engine.name] for pair in pairs)
        row[f"{engine.name}_resident_mb"] = engine.ask(op="memory")
        if work == "decode":
            shares = [pair[engine.name] * touched / pair["bandwidth"] for pair in pairs]
            row[f"{engine.name}_share"] = statistics.median(shares)
    if len(engines) == 2:
        ratios = sorted(pair["ours"] / pair["llama"] for pair in pairs)
        row["ratio"] = statistics.median(ratios)
        row["ratio_spread"] = [ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="qwen3moe-8L,deepseek2-8L")
    parser.add_argument("--types", default="Q4_K_M,Q8_0,BF16")
    parser.add_argument("--prompts", default="512,4096")
    parser.add_argument("--depths", default="128,1024,8192")
    parser.add_argument("--batches", default="1,2,4,8,16", help=f"sequences from about {BATCH_DEPTH} tokens on")
    parser.add_argument("--cache", default="bf16", choices=("bf16", "f16", "q8_0"), help="of both; llama.cpp's bf16 is its f16")
    parser.add_argument("--slices", type=int, default=7, help="pairs of slices a row")
    parser.add_argument("--flash", type=int, default=1, choices=(0, 1), help="llama.cpp's flash attention")
    parser.add_argument("--llama", help="an interpreter that imports llama_cpp; default: made in .venv-peers; none: ours alone")
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    llama = options.llama or environment.llama_python()
    sizes_of = {"prefill": options.prompts, "decode": options.depths, "batch": options.batches}
    wanted = [(work, int(size)) for work, text in sizes_of.items() for size in text.split(",") if size]
    results = []
    for name in options.models.split(","):
        family, sizes, rule = MODELS[name]
        for kind in options.types.split(","):
            with tempfile.TemporaryDirectory() as folder:
                path = write_synthetic(pathlib.Path(folder), family, sizes, kind, tokenizer=True)
                longest = max(size * (2 * BATCH_DEPTH if work == "batch" else 1) for work, size in wanted)
                engines = [Engine("ours", sys.executable, [folder, str(path), rule, options.cache])]
                if llama != "none":
                    cache = "f16" if options.cache == "bf16" else options.cache
                    engines.append(Engine("llama", llama, [str(path), str(options.flash), str(longest), cache]))
                try:
                    touched = touched_bytes(path, sizes)
                    rows = []
                    for work, size in wanted:
                        slices = min(3, options.slices) if size >= LONG else options.slices
                        rows.append(measure(engines, work, size, slices, touched))
                        print(name, kind, json.dumps(rows[-1]), file=sys.stderr, flush=True)
                finally:
                    for engine in engines:
                        engine.close()
                results += [{"model": name, "type": kind, "file_mb": path.stat().st_size / 1e6, **row} for row in rows]
    if options.json:
        options.json.write_text(json.dumps({"cpu": platform.processor(), "rows": results}, indent=1))
    show(results)


def show(rows: list[dict]) -> None:
    from rich.console import Console
    from rich.table import Table

    from ktransformers import native

    table = Table(title=f"Whole models, {native.threads()} threads, {native.isa()}", caption=CAPTION)
    for column in ("model", "type", "work", "ours", "llama.cpp", "ratio", "spread", "share", "resident MB", "llama's"):
        table.add_column(column, justify="right")
    for row in rows:
        low, high = row.get("ratio_spread", (0, 0))
        share = f"{row['ours_share']:.0%}" if "ours_share" in row else ""
        table.add_row(
            row["model"], row["type"], f"{row['work']} {row['tokens']}", f"{row['ours']:.1f}",
            f"{row.get('llama', 0):.1f}", f"{row.get('ratio', 0):.2f}", f"{low:.2f} .. {high:.2f}", share,
            f"{row['ours_resident_mb']:.0f}", f"{row.get('llama_resident_mb', 0):.0f}",
        )  # fmt: skip
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
