"""How long it takes to open a large GGUF and to build every handle of its experts: `make bench-open`.

The file has the tensors of a Qwen3-30B-A3B (hidden 2048, 128 experts of 768, Q4_K, vocabulary of 151936 strings) with as
many layers as fill --gb. Its data are a hole in the file: opening reads headers only, which is what is measured. Each
repetition is a process of its own; the tokenizer and the model's Python code are not part of it.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HIDDEN, INNER, EXPERTS, VOCABULARY = 2048, 768, 128, 151936


def write(path: Path, size: float) -> int:
    """Write a GGUF of at least `size` GB; returns its number of layers."""
    import gguf
    import numpy as np

    kind = gguf.GGMLQuantizationType.Q4_K
    shapes = {"gate": (EXPERTS, INNER, HIDDEN), "up": (EXPERTS, INNER, HIDDEN), "down": (EXPERTS, HIDDEN, INNER)}
    nbytes = {role: int(np.prod(shape)) // 256 * 144 for role, shape in shapes.items()}
    layers = -int(-size * 1e9 // sum(nbytes.values()))
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_token_list([f"token{i}" for i in range(VOCABULARY)])
    for layer in range(layers):
        for role, shape in shapes.items():
            packed = (*shape[:-1], shape[-1] // 256 * 144)
            name = f"blk.{layer}.ffn_{role}_exps.weight"
            writer.add_tensor_info(name, packed, np.dtype(np.uint8), nbytes[role], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        start = -(-path.stat().st_size // 32) * 32
        file.truncate(start + layers * sum(nbytes.values()))
    return layers


def measure(path: Path, layers: int) -> dict:
    """Seconds to open the file and to build the handles of all layers."""
    from ktransformers import native
    from ktransformers.loaders import open_weights

    native.isa()
    start = time.perf_counter()
    files = open_weights(path)
    opened = time.perf_counter()
    handles = []
    for layer in range(layers):
        stacks = [files.packed(f"blk.{layer}.ffn_{role}_exps.weight") for role in ("gate", "up", "down")]
        each = [[stack.expert(e) for e in range(EXPERTS)] for stack in stacks]
        handles.append(native.Experts(*each, name=f"blk.{layer}"))
    return {"open_s": opened - start, "handles_s": time.perf_counter() - opened, "handles": len(handles)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=5.0, help="size of the file (default: 5)")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one JSON object, no text")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(Path(options.one[0]), int(options.one[1]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "large.gguf")
        layers = write(path, options.gb)
        size = path.stat().st_size
        command = [sys.executable, "-m", "tests.bench.bench_open", "--one", str(path), str(layers)]
        ran = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(options.repeat)]
    runs = [json.loads(r.stdout) for r in ran]
    middle = {key: statistics.median(run[key] for run in runs) for key in ("open_s", "handles_s")}
    if options.json:
        print(json.dumps({"bytes": size, "layers": layers, **middle}))
        return
    print(
        f"{size / 1e9:.2f} GB, {layers} layers of {EXPERTS} experts: open {middle['open_s']:.3f} s, handles "
        f"{middle['handles_s']:.3f} s (medians of {options.repeat})"
    )


if __name__ == "__main__":
    main()
