"""What adapters cost the engine of `kt serve`: `make bench-adapters`.

A model of random weights (of bench_whole.py) decodes streams of the base, of an adapter on attention, and of one on
attention and experts, alone and mixed, without HTTP. Kinds take turns within a round; figures are medians over rounds.
"""

import argparse
import json
import pathlib
import platform
import statistics
import tempfile
import threading
import time
import timeit
from typing import Any

import torch
from transformers import AutoConfig

from ktransformers import native, optimize_and_load
from ktransformers.configs import meta_model
from ktransformers.engine.batching import BatchingEngine
from ktransformers.engine.forms import Forms
from ktransformers.engine.requests import Done, Request, Token
from ktransformers.loaders.lora import Adapter, LowRank, places
from ktransformers.loaders.peft_files import write_peft
from ktransformers.sft.adapters import load_adapter
from tests.bench.bench_model import write_synthetic
from tests.bench.bench_whole import MODELS

RANK, PROMPT = 8, 32
KINDS = {
    "base": ["", "", "", ""], "attention": ["a"] * 4, "experts": ["e"] * 4, "one base": [""],
    "one attention": ["a"], "one experts": ["e"], "base and attention": ["", "", "a", "a"], "all three": ["", "", "a", "e"],
}  # fmt: skip
"""Adapter of each stream."""


def write_adapter(folder: pathlib.Path, model: Any, ends: tuple[str, ...]) -> pathlib.Path:
    """A PEFT folder of random factors on all matrices whose names end so."""
    torch.manual_seed(1)
    changes = {}
    for name, place in places(model).items():
        if name.endswith(ends):
            *lead, rows, columns = place.shape
            a, b = torch.randn(*lead, RANK, columns) / columns**0.5, torch.randn(*lead, rows, RANK) / 50
            changes[name] = LowRank(a, b, 1.0)
    write_peft(Adapter(folder, RANK, changes), folder, model)
    return folder


def decoded(engine: BatchingEngine, adapters: list[str], tokens: int) -> float:
    """Tokens a second of all streams together, while all of them run."""
    moments: list[list[float]] = [[] for _ in adapters]
    ended = [threading.Event() for _ in adapters]

    def listener(i: int) -> Any:
        def hear(event: Any) -> None:
            if isinstance(event, Token):
                moments[i].append(time.perf_counter())
            elif isinstance(event, Done):
                ended[i].set()

        return hear

    for i, adapter in enumerate(adapters):
        engine.submit(Request([(7 * j + i) % 1000 for j in range(PROMPT)], tokens, adapter=adapter), listener(i))
    for each in ended:
        each.wait()
    begin, end = max(each[0] for each in moments), min(each[-1] for each in moments)
    return sum(begin < moment <= end for each in moments for moment in each) / (end - begin)


def switching(forms: Forms) -> float:
    """Milliseconds from one form to the next."""
    names = ["", *forms.names]
    return min(timeit.repeat(lambda: [forms.use(name) for name in names], number=20, repeat=5)) / 20 / len(names) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen3moe-8L", choices=MODELS)
    parser.add_argument("--type", default="Q4_K_M")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=pathlib.Path, help="where the model stays from one run to the next")
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measured(options, options.folder or pathlib.Path(folder))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    print(f"{found['isa']}, {found['threads']} threads, {options.model} {options.type}, adapters of rank {RANK}")
    for name, bytes_ in found["bytes"].items():
        print(f"adapter {name}: {bytes_ / 1e6:.0f} MB")
    for kind, rate in found["tokens/s"].items():
        print(f"{kind:20} {len(KINDS[kind])} streams {rate:8.1f} tokens/s")
    print(f"from one form to the next: {found['switch_ms']:.3f} ms")


def measured(options: argparse.Namespace, folder: pathlib.Path) -> dict[str, Any]:
    family, sizes, rule = MODELS[options.model]
    path = folder / f"synthetic-{options.type}.gguf"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_synthetic(folder, family, sizes, options.type)
    config = AutoConfig.from_pretrained(folder)
    config.dtype = torch.bfloat16
    model = optimize_and_load(meta_model(config), rule, path, devices={"cuda": "cpu"}, progress=False)
    forms = Forms(model)
    attention = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")
    with tempfile.TemporaryDirectory() as written:
        for name, ends in (("a", attention), ("e", (*attention, "experts.gate_up_proj", "experts.down_proj"))):
            put = write_adapter(pathlib.Path(written) / name, meta_model(config), ends)
            forms.add(name, lambda model, put=put: load_adapter(model, put), name.encode())
    rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(options.rounds + 1):
        for kind, adapters in KINDS.items():
            engine = BatchingEngine(model, forms=forms)
            rate = decoded(engine, adapters, options.tokens)
            engine.close()
            if number:  # the first round makes what is made once
                rates[kind].append(rate)
    return {
        "cpu": platform.processor(), "isa": native.isa(), "threads": native.threads(),
        "bytes": {name: sum(each.values()) for name, each in forms.nbytes().items()}, "switch_ms": switching(forms),
        "tokens/s": {kind: statistics.median(each) for kind, each in rates.items()},
    }  # fmt: skip


if __name__ == "__main__":
    main()
