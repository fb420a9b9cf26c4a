"""`kt serve` under several streams: `make bench-serve`.

Clients on raw sockets read `/v1/completions` of a model of random weights (qwen3moe-8L of bench_whole.py, or --model's).
Beside it, in turns, with the server stopped: the same tokens by `engine.generate`, which is what `kt chat` runs, and
llama.cpp's batched decoding of as many sequences from the same GGUF, without a server (its server is not on PyPI), so
that the ratio is the harder one. Ratios are taken inside a round; shared machines change from minute to minute.
"""

import argparse
import asyncio
import itertools
import json
import os
import pathlib
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from tests.bench.bench_model import write_synthetic
from tests.bench.bench_whole import ENV, MODELS, Engine
from tests.bench.peers import environment

PROMPT, TOKENS = 32, 48  # of a stream
PREFIX, LONG = 2048, 4096
WORDS = 20000  # of the vocabulary that prompts are drawn from


class Server:
    """`kt serve` in a process of its own."""

    def __init__(self, arguments: list[str]) -> None:
        command = [sys.executable, "-m", "ktransformers.cli", "serve", *arguments, "--port", "0", "--json"]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=environment.ROOT,
            env={**os.environ, "PYTHONPATH": str(environment.ROOT), **ENV["ours"]},
        )  # fmt: skip
        said = ""
        while "}" not in said:
            line = self.process.stdout.readline()
            if not line:
                raise SystemExit(f"kt serve ended with status {self.process.wait()}")
            said += line
        self.host, _, port = json.loads(said)["url"].removeprefix("http://").partition(":")
        self.port = int(port)
        asyncio.run(self._healthy())

    async def _healthy(self) -> None:
        while not (await self._get("/health")).startswith(b"HTTP/1.1 200"):
            await asyncio.sleep(0.2)

    async def _get(self, path: str) -> bytes:
        reader, writer = await asyncio.open_connection(self.host, self.port)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        found = await reader.read()
        writer.close()
        return found

    async def stream(self, ids: list[int], tokens: int) -> list[float]:
        """When the request was sent, and when each event with text came, in seconds."""
        body = json.dumps({"model": "x", "prompt": ids, "max_tokens": tokens, "stream": True, "temperature": 0,
                           "ignore_eos": True}).encode()  # fmt: skip
        reader, writer = await asyncio.open_connection(self.host, self.port)
        times = [time.perf_counter()]
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        while line := await reader.readline():
            if line.startswith(b"data: [DONE]"):
                break
            if line.startswith((b'data: {"error"', b"HTTP/1.1 4")):
                raise SystemExit(f"kt serve: {line.decode()} {(await reader.read(500)).decode()}")
            if line.startswith(b"data: "):
                times.append(time.perf_counter())
        writer.close()
        return times

    def stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self.go_on()
        self.process.terminate()
        self.process.wait()


def prompt(length: int, chance: random.Random) -> list[int]:
    return [chance.randrange(300, WORDS) for _ in range(length)]


def streams(server: Server, count: int, chance: random.Random) -> float:
    """Tokens a second of `count` streams at once, from the first token of the last to begin to the end of the first."""

    async def all_of_them() -> list[list[float]]:
        return await asyncio.gather(*(server.stream(prompt(PROMPT, chance), TOKENS) for _ in range(count)))

    server.go_on()
    times = asyncio.run(all_of_them())
    server.stop()
    begin, end = max(each[1] for each in times), min(each[-1] for each in times)
    return sum(sum(begin < at <= end for at in each) for each in times) / (end - begin)


def first_token(server: Server, ids: list[int]) -> float:
    """Seconds to the first token behind a prompt."""
    server.go_on()
    times = asyncio.run(server.stream(ids, 1))
    server.stop()
    return times[1] - times[0]


def stall(server: Server, chance: random.Random) -> dict[str, float]:
    """The longest gap in a stream while a long prompt is computed, beside how long its chunks take."""

    async def both() -> tuple[list[float], float]:
        running = asyncio.create_task(server.stream(prompt(PROMPT, chance), 200))
        await asyncio.sleep(1.0)
        begin = time.perf_counter()
        times = await server.stream(prompt(LONG, chance), 1)
        return await running, times[1] - begin

    server.go_on()
    times, seconds = asyncio.run(both())
    server.stop()
    gaps = [after - before for before, after in itertools.pairwise(times[1:])]
    chunk = seconds / (LONG / 512)
    return {"longest_gap": max(gaps), "usual_gap": statistics.median(gaps), "chunk_with_step": chunk, "prompt": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen3moe-8L", choices=MODELS)
    parser.add_argument("--type", default="Q4_K_M")
    parser.add_argument("--streams", default="1,2,4,8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--llama", help="an interpreter that imports llama_cpp; default: made in .venv-peers; none: ours alone")
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    llama = options.llama or environment.llama_python()
    family, sizes, rule = MODELS[options.model]
    with tempfile.TemporaryDirectory() as folder:
        path = write_synthetic(pathlib.Path(folder), family, sizes, options.type, tokenizer=True)
        peers = [Engine("ours", sys.executable, [folder, str(path), rule, "bf16"])]
        if llama != "none":
            peers.append(Engine("llama", llama, [str(path), "1", "1024", "f16"]))
        arguments = [str(path), "--rule", rule, "--devices", "cuda=cpu", "--cache-ram", "4GiB",
                     "--cache-dir", f"{folder}/blocks", "--cache-disk", "8GiB"]  # fmt: skip
        server = Server(arguments)
        try:
            rows = [row(server, peers, int(count), options.rounds) for count in options.streams.split(",")]
            prefix = prefixes(server, arguments, options.rounds)
            server = prefix.pop("server")
            gap = stall(server, random.Random(7))
        finally:
            for each in (*peers, server):
                each.close()
    found = {"cpu": platform.processor(), "model": options.model, "type": options.type, "streams": rows,
             "prefix": prefix, "stall": gap}  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    show(found)


def row(server: Server, peers: list[Engine], count: int, rounds: int) -> dict[str, Any]:
    """Streams, and the same without a server, in turns."""
    chance, pairs = random.Random(count), []
    streams(server, count, chance)  # warm
    for _ in range(rounds):
        pair = {"served": streams(server, count, chance)}
        for peer in peers:
            request = {"op": "decode", "tokens": 64} if count == 1 else {"op": "batch", "sequences": count, "tokens": 64}
            pair[peer.name] = count / statistics.median(peer.ask(**request, count=24))
        pairs.append(pair)
    result = {"streams": count, **{name: statistics.median(pair[name] for pair in pairs) for name in pairs[0]}}
    for name in pairs[0].keys() - {"served"}:
        result[f"ratio_to_{name}"] = statistics.median(pair["served"] / pair[name] for pair in pairs)
    step = statistics.median(count / pair["ours"] for pair in pairs)
    result["overhead_ms_a_stream"] = statistics.median(1e3 * (count / pair["served"] - step) / count for pair in pairs)
    print(json.dumps(result), file=sys.stderr, flush=True)
    return result


def prefixes(server: Server, arguments: list[str], rounds: int) -> dict[str, Any]:
    """Time to the first token behind a prompt whose beginning is new, in memory, and on disk after a restart."""
    chance = random.Random(3)
    shared = [prompt(PREFIX, chance) for _ in range(rounds)]
    new = [first_token(server, [*ids, *prompt(16, chance)]) for ids in shared]
    kept = [first_token(server, [*ids, *prompt(16, chance)]) for ids in shared]
    server.close()  # writes what is to be written
    server = Server(arguments)
    first_token(server, prompt(64, chance))
    disk = [first_token(server, [*ids, *prompt(16, chance)]) for ids in shared]
    times = {name: statistics.median(each) for name, each in (("new", new), ("ram", kept), ("disk", disk))}
    ratios = {f"{name}_ratio": statistics.median(b / a for a, b in zip(new, each, strict=True))
              for name, each in (("ram", kept), ("disk", disk))}  # fmt: skip
    return {"tokens": PREFIX, **times, **ratios, "server": server}


def show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from ktransformers import native

    where = f"{found['model']} {found['type']}, {native.threads()} threads, {native.isa()}"
    table = Table(title=f"kt serve, {where}", caption="tokens/s of all streams; without a server: our engine, llama.cpp")
    for column in ("streams", "served", "of one", "engine alone", "ratio", "llama.cpp", "ratio", "ms a stream and token"):
        table.add_column(column, justify="right")
    one = found["streams"][0]["served"]
    for each in found["streams"]:
        table.add_row(
            str(each["streams"]), f"{each['served']:.1f}", f"{each['served'] / one:.2f}", f"{each['ours']:.1f}",
            f"{each['ratio_to_ours']:.2f}", f"{each.get('llama', 0):.1f}", f"{each.get('ratio_to_llama', 0):.2f}",
            f"{each['overhead_ms_a_stream']:.2f}",
        )  # fmt: skip
    console = Console(width=130)
    console.print(table)
    prefix, gap = found["prefix"], found["stall"]
    console.print(
        f"First token behind {prefix['tokens']} tokens: {prefix['new']:.2f} s new, {prefix['ram']:.3f} s from memory "
        f"({prefix['ram_ratio']:.1%}), {prefix['disk']:.3f} s from disk after a restart ({prefix['disk_ratio']:.1%})."
    )
    console.print(
        f"While {LONG} tokens are computed ({gap['prompt']:.2f} s) a stream waits {gap['longest_gap'] * 1e3:.0f} ms at most "
        f"(a chunk with its step takes {gap['chunk_with_step'] * 1e3:.0f}), {gap['usual_gap'] * 1e3:.0f} ms usually."
    )


if __name__ == "__main__":
    main()
