"""How long commands take to start, beside what importing torch and one model class of transformers takes: `make bench-start`.

Every command runs in a process of its own, in turn with the others, so that a slow minute meets all of them. Shown are
medians: seconds until the first byte of output, seconds until the end, CPU seconds, and the ratio of the end to that of
the plain import in the same run. `--imports` prints what the heaviest imports of the plain import and of chat are.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
KT = ["-m", "ktransformers"]
PLAIN = "torch and the model's class"
COMMANDS: dict[str, tuple[list[str], str]] = {
    "python": (["-c", "pass"], ""),
    "torch": (["-c", "import torch"], ""),
    "transformers, Auto classes": (["-c", "from transformers import AutoConfig, AutoModelForCausalLM"], ""),
    PLAIN: (["-c", "import torch; from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM"], ""),
    "kt --help": ([*KT, "--help"], ""),
    "kt chat --no-such-flag": ([*KT, "chat", "--no-such-flag"], ""),
    "kt list": ([*KT, "list"], ""),
    "kt plan deepseek-v3": ([*KT, "plan", "deepseek-v3", "--gpu", "24GiB", "--ram", "400GiB", "--format", "Q4_K_M", "--json"], ""),
    "kt rules check": ([*KT, "rules", "check", "DeepSeek-V3", "deepseek-v3"], ""),
    "echo hi | kt chat": ([*KT, "chat"], "hi\n"),
}
"""What is timed: arguments of the interpreter, and standard input."""


def run(arguments: list[str], text: str) -> tuple[float, float, float]:
    """Run one command; returns seconds to the first byte (on either stream), to the end, and CPU seconds."""
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )  # fmt: skip
    assert process.stdin and process.stdout
    process.stdin.write(text.encode())
    process.stdin.close()
    byte = os.read(process.stdout.fileno(), 1)
    first = time.perf_counter() - begin
    while os.read(process.stdout.fileno(), 1 << 16):
        pass
    _, _, used = os.wait4(process.pid, 0)
    end = time.perf_counter() - begin
    return first if byte else float("nan"), end, used.ru_utime + used.ru_stime


def imports(arguments: list[str], text: str, least: float) -> list[tuple[float, int, str]]:
    """(seconds with all they import, depth, module) of imports of at least `least` seconds, outermost first."""
    ran = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments], cwd=ROOT, input=text, capture_output=True, text=True, check=False
    )  # fmt: skip
    found = re.findall(r"^import time:\s+\d+ \|\s+(\d+) \| ( *)(\S+)$", ran.stderr, re.M)
    rows = [(int(micros) / 1e6, len(indent) // 2, name) for micros, indent, name in found]
    return [row for row in reversed(rows) if row[0] >= least]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="runs of each command (5)")
    parser.add_argument("--json", type=Path, help="write the medians to this file")
    parser.add_argument("--imports", type=float, metavar="SECONDS", help="list imports that take at least this long")
    options = parser.parse_args()
    console = Console()
    if options.imports:
        for name in (PLAIN, "echo hi | kt chat"):
            console.print(f"[bold]{name}[/bold]")
            for seconds, depth, module in imports(*COMMANDS[name], options.imports):
                console.print(f"{seconds:7.2f} s  {'  ' * depth}{module}", highlight=False)
        return
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in COMMANDS}
    with console.status("") as status:
        for i in range(options.rounds):
            for name, (arguments, text) in COMMANDS.items():
                status.update(f"round {i + 1} of {options.rounds}: {name}")
                times[name].append(run(arguments, text))
    medians = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in times.items()}
    table = Table(title=f"Start, medians of {options.rounds}, {os.cpu_count()} cores", title_justify="left")
    for column in ("command", "first output s", "end s", "CPU s", "end / plain import"):
        table.add_column(column, justify="left" if column == "command" else "right")
    for name, (first, end, cpu) in medians.items():
        shown = "" if first != first else f"{first:.2f}"
        table.add_row(name, shown, f"{end:.2f}", f"{cpu:.2f}", f"{end / medians[PLAIN][1]:.2f}")
    console.print(table)
    if options.json:
        keys = ("first_output_s", "end_s", "cpu_s")
        rows = {name: {k: None if v != v else v for k, v in zip(keys, row, strict=True)} for name, row in medians.items()}
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
