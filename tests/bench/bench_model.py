"""Load time, peak memory, prefill and decode speed of whole models: `make bench-model`.

Models: the embedded one, from both of its files, and a synthetic Q4_K_M Qwen3-MoE of 1.6 GB with the layer sizes of
Qwen3-30B-A3B (random weights: only speed and memory mean anything). Each runs in a process of its own, so that peak
memory is its own. Not a comparison with other engines.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SYNTHETIC = dict(
    vocab_size=32000, hidden_size=2048, num_hidden_layers=8, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
    intermediate_size=6144, moe_intermediate_size=768, num_experts=64, num_experts_per_tok=8, norm_topk_prob=True,
    tie_word_embeddings=False, dtype="bfloat16",
)  # fmt: skip
LATENT = ("num_attention_heads", "qk_nope_head_dim", "v_head_dim", "kv_lora_rank")


def write_synthetic(
    folder: Path, model_type: str = "qwen3_moe", sizes: dict = SYNTHETIC, mix: str = "Q4_K_M", tokenizer: bool = False
) -> Path:
    """Write config.json and a GGUF of random valid blocks as `quantize --type MIX` types them; returns its path.

    `tokenizer`: with made-up tokens of bytes, without which llama.cpp does not open a file.
    """
    import gguf
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from ktransformers.gguf_files.config import add_config
    from ktransformers.gguf_files.write import choose_type
    from ktransformers.loaders import gguf_names
    from ktransformers.quants.blocks import quant_type

    config = AutoConfig.for_model(model_type, **sizes)
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {n: tuple(t.shape) for n, t in AutoModelForCausalLM.from_config(config).state_dict().items()}
    family = next(f for f in gguf_names.FAMILIES.values() if model_type in f.model_types)
    path = folder / f"synthetic-{mix}.gguf"
    writer = gguf.GGUFWriter(path, family.arch)
    add_config(writer, family.arch, config)
    for name, shape in shapes.items():
        layer = name.split(".")[2] if name.startswith("model.layers.") else ""
        if name.endswith("experts.gate_up_proj"):
            pieces = [(f"blk.{layer}.ffn_{which}_exps.weight", (shape[0], shape[1] // 2, shape[2])) for which in ("gate", "up")]
        elif name.endswith("experts.down_proj"):
            pieces = [(f"blk.{layer}.ffn_down_exps.weight", shape)]
        elif name.endswith("kv_b_proj.weight"):  # in two parts, as llama.cpp wants them; rows of 128 are no K-quants
            heads, nope, value, lora = (getattr(config, n) for n in LATENT)
            for part, size in (("k", (heads, lora, nope)), ("v", (heads, value, lora))):
                add_random(writer, f"blk.{layer}.attn_{part}_b.weight", size, quant_type("BF16" if mix == "BF16" else "Q8_0"))
            continue
        else:
            pieces = [(gguf_names.gguf_name(family, config.num_hidden_layers, name), shape)]
        for stored, size in pieces:
            add_random(writer, stored, size, choose_type(stored, size, mix, config.num_hidden_layers, False))
    if tokenizer:
        add_tokenizer(writer, config.vocab_size)
        if getattr(config, "q_lora_rank", 0) is None:  # llama.cpp wants it said
            writer.add_q_lora_rank(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer, size: int) -> None:
    """Byte-level BPE of `size` tokens: four of control, the bytes, and pairs of bytes."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    pairs = [(x, y) for x in letters for y in letters][: size - 4 - len(letters)]
    tokens = ["<unk>", "<s>", "</s>", "<pad>", *letters, *(x + y for x, y in pairs)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i < 4 else 1 for i in range(len(tokens))])
    writer.add_token_merges([f"{x} {y}" for x, y in pairs])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


SCALES = {"Q4_K": (0, 2), "Q6_K": (-2,), "Q8_0": (0,)}
"""Where the fp16 scales of a block begin."""


def add_random(writer, name: str, shape: tuple[int, ...], quant) -> None:
    """Add a tensor of random codes with small scales, or of random numbers."""
    import gguf
    import numpy as np

    random = np.random.default_rng(len(name))
    if quant.name == "BF16":
        numbers = random.normal(0, 0.02, shape).astype(np.float32).view(np.uint32) >> 16
        raw = numbers.astype(np.uint16).view(np.uint8)
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
        return
    if quant.name not in SCALES:
        writer.add_tensor(name, random.normal(1 if "norm" in name else 0, 0.02, shape).astype(np.float32))
        return
    rows = int(np.prod(shape[:-1]))
    blocks = random.integers(0, 256, (rows * shape[-1] // quant.block, quant.nbytes), dtype=np.uint8)
    scale = np.full((len(blocks), 1), 2e-5, np.float16).view(np.uint8)
    for at in SCALES[quant.name]:
        blocks[:, slice(at, at + 2 or None)] = scale
    writer.add_tensor(name, blocks.reshape(*shape[:-1], -1), raw_dtype=gguf.GGMLQuantizationType(quant.id))


def status(key: str) -> float:
    """A field of /proc/self/status in MB, 0.0 where there is none."""
    lines = Path("/proc/self/status").read_text().splitlines() if Path("/proc/self/status").exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(key + ":")), 0.0)


def forget_what_was_read_once(model) -> None:
    """Give back the pages of the file that loading read to make dense weights of; peak memory counts from here."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    for data in model.gguf_loader.files._bytes.values():
        libc.madvise(ctypes.c_void_p(data.data_ptr()), ctypes.c_size_t(data.numel()), 4)  # MADV_DONTNEED: clean pages
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew


def meet_every_expert(model) -> None:
    """Send a token to each expert, as some prompt will: random routers leave some out, and memory is to count all."""
    import torch

    from ktransformers.operators.experts import KTransformersExperts

    for experts in model.modules():
        if isinstance(experts, KTransformersExperts):
            hidden = torch.zeros(experts.n_experts, model.config.hidden_size, dtype=model.dtype)
            ids = torch.arange(experts.n_experts).unsqueeze(1)
            experts(hidden, ids, torch.ones(len(ids), 1))


def measure(folder: Path, weights: Path, rule: str, prompt: int, count: int) -> dict:
    """Load and run one model in this process. Times in seconds, memory in MB, speeds in tokens per second."""
    import statistics

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from ktransformers import native, optimize_and_load
    from ktransformers.engine.generate import Sampling, Timing, generate

    before = status("RssAnon")
    start = time.perf_counter()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    devices = None if torch.cuda.is_available() else {"cuda": "cpu"}
    optimize_and_load(model, rule, weights, devices=devices, progress=False)
    loaded = time.perf_counter() - start
    after_load = status("RssAnon")
    forget_what_was_read_once(model)
    ids = torch.randint(1, model.config.vocab_size, (prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    timings = []
    for _ in range(3):
        timing = Timing()
        for _ in generate(model, ids, max_new_tokens=count, sampling=Sampling(), timing=timing):
            pass
        timings.append(timing)
    meet_every_expert(model)
    return {
        "weights": weights.name,
        "file_mb": weights.stat().st_size / 1e6,
        "load_s": loaded,
        "anonymous_mb_by_loading": after_load - before,
        "peak_rss_mb": status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "prefill_tokens_s": statistics.median(t.prefill_rate for t in timings),
        "decode_tokens_s": statistics.median(t.decode_rate for t in timings),
        "prompt": prompt,
        "isa": native.isa(),
        "threads": native.threads(),
    }


def run(arguments: list[str]) -> dict:
    ran = subprocess.run(
        [sys.executable, "-m", "tests.bench.bench_model", "--one", *arguments], capture_output=True, text=True
    )
    if ran.returncode:
        raise SystemExit(ran.stderr)
    return json.loads(ran.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object per model, no table")
    parser.add_argument("--quick", action="store_true", help="the embedded model only")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        folder, weights, rule, prompt, count = options.one
        print(json.dumps(measure(Path(folder), Path(weights), rule, int(prompt), int(count))))
        return
    from ktransformers.models import embedded_model
    from rich.console import Console
    from rich.table import Table

    embedded = embedded_model()
    rows = [run([str(embedded), str(path), "DeepSeek-V3", "256", "64"])
            for path in (embedded / "model.safetensors", next(embedded.glob("*.gguf")))]  # fmt: skip
    if not options.quick:
        with tempfile.TemporaryDirectory() as name:
            path = write_synthetic(Path(name))
            rows.append(run([name, str(path), "Qwen3-MoE", "512", "64"]))
    if options.json:
        print("\n".join(json.dumps(row) for row in rows))
        return
    table = Table(title=f"Whole models, {rows[0]['threads']} threads, {rows[0]['isa']}, medians of 3")
    for column in (
        "weights",
        "file MB",
        "load s",
        "anon. MB",
        "peak RSS MB",
        "prompt",
        "prefill tok/s",
        "decode tok/s",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(row["weights"], f"{row['file_mb']:.0f}", f"{row['load_s']:.2f}", f"{row['anonymous_mb_by_loading']:.0f}",
                      f"{row['peak_rss_mb']:.0f}", str(row["prompt"]), f"{row['prefill_tokens_s']:.0f}", f"{row['decode_tokens_s']:.1f}")  # fmt: skip
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
