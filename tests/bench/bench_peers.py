"""The C library beside llama.cpp, upstream's kernels and torch on the same work: `make bench-peers`.

Each peer is a process of its own (tests/bench/peers) with the same weights, routing, activations and thread count. They take
turns in short slices, all others stopped; our probes of the read bandwidth and of the multiplier run right before and after each
slice. The limit of a call is the longer of (bytes of the experts it touches / bandwidth) and (operations / peak), for
every peer the bytes and the multiplier of the *published* format. Figures are medians over slices; shares and
ratios are taken inside a slice first. Shared machines change from minute to minute: quote shares and ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import pathlib
import pickle
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ktransformers import native
from tests.bench.peers import environment, work
from tests.bench.peers.ours import offered
from tests.bench.peers.process import Child, Gone, busy_seconds

PEERS = ("llama", "llama-repack", "upstream", "torch")
QUICK_TYPES = ("Q4_K", "Q8_0", "BF16", "FP8", "MXFP4", "RAWINT4")
TYPES = ("Q4_0", "Q8_0", "Q4_K", "Q6_K", "IQ2_XXS", "IQ3_S", "IQ4_XS", "MXFP4", "BF16", "FP8", "FP8_PERCHANNEL",
         "MXFP8", "RAWINT4", "GPTQ_INT4", "AMXINT8", "AMXINT4")  # fmt: skip
SKEWED_FROM = 32  # tokens; with fewer, skew only means experts that are still in the cache
QUIET = 0.15  # cores that others may take during a slice that counts
LONG = 1.0  # seconds a call; such a peer gets only three slices
WRONG = 0.5  # an error from which on a figure is no figure
BF16_PEAK = ("BF16", "FP8", "FP8_PERCHANNEL", "MXFP8")
F32_PEAK = ("F32", "F16")
CAPTION = (
    "µs of a call; ×: time / ours (more than 1: we are faster); %: of the limit measured around it. "
    "upstream: the PyPI wheel as users get it; its queue thread and spinning workers outnumber two cores, which costs it "
    "most at T=1. torch: bf16 experts whatever the type, grouped_mm or F.linear, whichever is faster. "
    "llama: T > 512 in micro-batches of 512."
)


@dataclass
class Row:
    """One peer in one cell. Times in microseconds; share, ratio and speeds are medians over slices."""

    shape: str
    hidden: int
    inner: int
    experts: int
    per_token: int
    layers: int
    type: str
    isa: str
    threads: int
    tokens: int
    routing: str
    peer: str
    runs: str  # class or variant
    unique: float  # experts a call touches
    bytes: float
    ops: float
    limit: str  # "read" or the multiplier
    read_gbs: float
    peak_gops: float
    us: float
    us_q1: float
    us_q3: float
    slices: int
    calls: int
    gbs: float
    gops: float
    share: float
    ratio: float | None  # time / our time
    error: float  # mean|d| / mean|ref|
    noise: float  # cores that other processes took
    idle: float  # cores that the peer burns with nothing to do
    huge: float  # share of its memory in huge pages


@dataclass
class Slice:
    seconds: float
    calls: int
    limit: float  # seconds
    read: float
    unit: str
    peak: float
    noise: float


@dataclass
class Bench:
    options: argparse.Namespace
    isa: str
    say: Any
    folder: pathlib.Path
    missing: dict[str, dict[str, list[str]]] = field(default_factory=dict)  # peer -> reason -> where
    rows: list[Row] = field(default_factory=list)

    def lacks(self, peer: str, reason: str, where: str) -> None:
        found = self.missing.setdefault(peer, {}).setdefault(reason, [])
        if where not in found:
            found.append(where)
        if len(found) == 1:
            self.say(f"  {peer}: - ({reason})")


def multiplier(name: str) -> str:
    return "bf16" if name in BF16_PEAK else "f32" if name in F32_PEAK else "int8"


def dump(value: Any, path: pathlib.Path) -> str:
    with open(path, "wb") as file:
        pickle.dump(value, file, protocol=5)
    return str(path)


# ---- one layer: start the peers and give them the weights ----


def start(
    bench: Bench, job: work.Work, values: dict[str, list[torch.Tensor]], where: str
) -> dict[str, tuple[Child, str]]:
    """The peers that took the weights, with a word on what runs; "ours" first, if it has the format."""
    path = dump(job, bench.folder / "work")
    bf16 = {r: [v.bfloat16().view(torch.int16).numpy() for v in some] for r, some in values.items()}
    dense = dump(replace(job, tensors={r: [] for r in work.ROLES}, values=bf16), bench.folder / "dense")
    out: dict[str, tuple[Child, str]] = {}
    for name in ("ours", *bench.options.peers):
        child = Child(name, bench.isa, job.threads, bench.options.pages == "huge", bench.folder)
        try:
            word = child.ask("load", dense if name == "torch" else path)
            child.stop()
            out[name] = (child, word)
        except Gone as reason:
            child.close()
            bench.lacks(name, str(reason), where)
    return out


# ---- one cell: slices in turn ----


def cell(bench: Bench, probe: Child, peers: dict[str, tuple[Child, str]], job: work.Work, shape: str,
         one: work.Case, routing: str, truth: torch.Tensor) -> None:  # fmt: skip
    options = bench.options
    path, where = dump(one, bench.folder / "case"), f"{shape} {job.type} T={one.tokens}"
    ready: dict[str, tuple[str, float, float]] = {}  # peer -> what runs, error, seconds of a call
    for name, (child, word) in list(peers.items()):
        try:
            variant, out, seconds = child.ask("prepare", path)
            error = float((torch.from_numpy(out) - truth).abs().mean() / truth.abs().mean())
            ready[name] = (variant or word, error, seconds)
            if not child.watched:
                child.watch_idle()
            child.stop()
        except Gone as reason:
            bench.lacks(name, str(reason), where)
            peers.pop(name)[0].close()
    moved, ops = one.unique * job.expert_bytes, 6.0 * job.hidden * job.inner * job.per_token * one.tokens

    def limits() -> dict[str, Any]:
        read, unit, peak = probe.ask("probe", [multiplier(job.type), "f32"], job.threads)
        probe.stop()
        return {"read": read, "unit": unit, "peak": peak}

    def turn(name: str, before: dict[str, Any]) -> tuple[Slice, dict[str, Any]]:
        child = peers[name][0]
        wall, busy = time.perf_counter(), busy_seconds() - child.cpu()
        times, _ = child.ask("run", options.seconds)
        noise = (busy_seconds() - child.cpu() - busy) / (time.perf_counter() - wall)
        child.stop()
        after = limits()
        read, peak = ((before[k] + after[k]) / 2 for k in ("read", "peak"))
        limit = max(moved / read, ops / peak) / 1e9
        return Slice(statistics.median(times), len(times), limit, read, after["unit"], peak, noise), after

    taken: dict[str, list[Slice]] = {name: [] for name in ready}
    paired: list[dict[str, Slice]] = []
    rounds, kept = 0, 0
    while ready and kept < options.slices and rounds < options.slices * (1 if options.quick else 2):
        before, this = limits(), {}
        names = list(ready)
        for name in names[rounds % len(names) :] + names[: rounds % len(names)]:
            if ready[name][2] > LONG and len(taken[name]) >= 3:
                continue
            try:
                this[name], before = turn(name, before)
            except Gone as reason:
                bench.lacks(name, str(reason), where)
                peers.pop(name)[0].close()
                ready.pop(name)
        rounds += 1
        kept += all(s.noise < QUIET for s in this.values())
        paired.append(this)
        for name, value in this.items():
            taken[name].append(value)
    comparable = "ours" in ready and ready["ours"][1] < WRONG
    for name, (runs, error, _) in ready.items():
        calm = [t for t in paired if name in t and t[name].noise < QUIET]
        chosen = calm if len(calm) >= 3 else [t for t in paired if name in t]
        bench.rows.append(
            summary(
                bench,
                job,
                shape,
                one,
                routing,
                name,
                runs,
                error,
                comparable and error < WRONG,
                (moved, ops),
                chosen,
                peers[name][0],
            )
        )


def summary(bench: Bench, job: work.Work, shape: str, one: work.Case, routing: str, name: str, runs: str, error: float,
            comparable: bool, cost: tuple[float, float], chosen: list[dict[str, Slice]], child: Child) -> Row:  # fmt: skip
    own = [t[name] for t in chosen]
    middle = statistics.median
    us = sorted(s.seconds * 1e6 for s in own)
    q1, _, q3 = statistics.quantiles(us, n=4, method="inclusive") if len(us) > 1 else (us[0],) * 3
    both = [t[name].seconds / t["ours"].seconds for t in chosen if "ours" in t] if comparable else []
    read, peak = middle(s.read for s in own), middle(s.peak for s in own)
    moved, ops = cost
    return Row(
        shape, job.hidden, job.inner, job.experts, job.per_token, job.layers, job.type, bench.isa, job.threads,
        one.tokens, routing, name, runs, one.unique, moved, ops, "read" if moved / read > ops / peak else own[0].unit, read, peak,
        middle(us), q1, q3, len(own), sum(s.calls for s in own), middle(moved / s.seconds / 1e9 for s in own),
        middle(ops / s.seconds / 1e9 for s in own), middle(s.limit / s.seconds for s in own),
        middle(both) if both else None, error, middle(s.noise for s in own), child.idle, child.huge_share(),
    )  # fmt: skip


# ---- output ----


def machine() -> dict[str, Any]:
    model = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "")
    features = [name for name, on in native.cpu_features().items() if on]
    return {"cpu": model or platform.machine(), "features": features, "last_level_cache": work.last_level_cache(),
            "memory": work.memory_bytes(), "torch": torch.__version__, "llama": environment.LLAMA,
            "upstream": environment.UPSTREAM, "time": time.strftime("%Y-%m-%d %H:%M")}  # fmt: skip


def save(bench: Bench) -> None:
    if bench.options.json:
        note = {"machine": machine(), "missing": bench.missing, "rows": [asdict(r) for r in bench.rows]}
        pathlib.Path(bench.options.json).write_text(json.dumps(note, indent=1) + "\n")


def times_table(bench: Bench, shape: str) -> Table:
    rows = [r for r in bench.rows if r.shape == shape]
    peers = [p for p in ("ours", *bench.options.peers) if any(r.peer == p for r in rows)]
    sizes = sorted({(r.inner, r.experts) for r in rows})
    title = f"{shape}: H{rows[0].hidden} " + ", ".join(f"I{i} E{e}" for i, e in sizes)
    title += f", top-{rows[0].per_token}, {rows[0].threads} threads, {bench.isa}, {bench.options.pages} pages"
    out = Table(title=title, caption=CAPTION)
    for column in ("type", "T", "routing", "limit"):
        out.add_column(column, justify="right" if column == "T" else "left", no_wrap=True)
    for peer in peers:
        out.add_column(peer, justify="right", no_wrap=True)
    cells: dict[tuple[str, int, str], dict[str, Row]] = {}
    for r in rows:
        cells.setdefault((r.type, r.tokens, r.routing), {})[r.peer] = r
    last = ""
    for (name, tokens, routing), found in cells.items():
        if last and last != name:
            out.add_section()
        some = next(iter(found.values()))
        speed = f"read {some.read_gbs:.0f} GB/s" if some.limit == "read" else f"{some.limit} {some.peak_gops:.0f} GOP/s"
        texts = [text(found.get(peer)) for peer in peers]
        out.add_row("" if last == name else name, str(tokens), routing, speed, *texts)
        last = name
    return out


def text(row: Row | None) -> str:
    if row is None:
        return "-"
    if not row.error < WRONG:
        return f"wrong: error {row.error:.2g}"
    if row.peer == "ours":
        return f"{row.us:.0f} ({row.us_q1:.0f}-{row.us_q3:.0f}) {row.share:.0%}"
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}x "
    return f"{row.us:.0f} {ratio}{row.share:.0%}"


def errors_table(bench: Bench) -> Table:
    """The largest error over shapes and token counts, and what ran."""
    out = Table(title="Error: mean|d| / mean|fp32 from dequantized weights|, largest over T; and what ran")
    peers = [p for p in ("ours", *bench.options.peers) if any(r.peer == p for r in bench.rows)]
    for column in ("type", *peers):
        out.add_column(column)
    for name in dict.fromkeys(r.type for r in bench.rows):
        line = []
        for peer in peers:
            found = [r for r in bench.rows if r.type == name and r.peer == peer]
            runs = "/".join(dict.fromkeys(r.runs for r in found))
            line.append(f"{max(r.error for r in found):.4g} {runs}" if found else "-")
        out.add_row(name, *line)
    return out


def report(bench: Bench, console: Console) -> None:
    for shape in dict.fromkeys(r.shape for r in bench.rows):
        console.print(times_table(bench, shape))
    if bench.rows:
        console.print(errors_table(bench))
    for peer, reasons in bench.missing.items():
        for reason, where in reasons.items():
            console.print(f"{peer}: - {reason} [{', '.join(where)}]", markup=False, highlight=False)
    idle = {r.peer: r.idle for r in bench.rows if r.idle > 0.02}
    if idle:
        said = ", ".join(f"{p} {v:.2f}" for p, v in idle.items())
        console.print(f"Cores burnt while idle (hence stopped while others ran): {said}", highlight=False)
    loud = sum(r.noise >= QUIET for r in bench.rows)
    if loud:
        console.print(f"{loud} of {len(bench.rows)} figures were taken while other processes used the cores.")


# ---- main ----


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    split = lambda text: [part for part in text.split(",") if part]  # noqa: E731
    numbers = lambda text: [int(part) for part in split(text)]  # noqa: E731
    parser.add_argument("--quick", action="store_true", help="S2, six types, T 1,32,512, 16 experts, 3 short slices")
    parser.add_argument("--json", metavar="FILE", help="write every figure there, after each cell")
    parser.add_argument("--types", type=split, help=f"comma-separated, or all (default: {','.join(TYPES)}, as far as "
                        "our library computes them)")  # fmt: skip
    parser.add_argument("--shapes", type=split, help="comma-separated of S1,S2,S3 (default: all)")
    parser.add_argument("--tokens", type=numbers, help="comma-separated token counts (default: 1,4,32,128,512)")
    parser.add_argument("--routing", type=split, help="of uniform,skewed (default: both, skewed from T=32)")
    parser.add_argument("--peers", type=split, default=list(PEERS), help=f"comma-separated of {','.join(PEERS)}")
    parser.add_argument("--isa", help="our KT_ISA; avx2 and avx_vnni also take peers built for them")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--experts", type=int, help="instead of the shape's count")
    parser.add_argument(
        "--pages", choices=("huge", "4k"), default="huge", help="of every peer's weights (default: huge)"
    )
    parser.add_argument("--slices", type=int, help="slices a cell (default: 7, quick: 3)")
    parser.add_argument("--seconds", type=float, help="of a slice (default: 0.25, quick: 0.1)")
    parser.add_argument("--jobs", type=int, default=1, help="compilers at a time when a peer is built")
    parser.add_argument("--build-only", action="store_true", help="make .venv-peers and stop")
    options = parser.parse_args()
    quick = options.quick
    options.shapes = options.shapes or (["S2"] if quick else ["S1", "S2", "S3"])
    options.tokens = options.tokens or ([1, 32, 512] if quick else [1, 4, 32, 128, 512])
    options.types = list(work.TYPES) if options.types == ["all"] else options.types
    options.skewed_from = 1 if options.routing else SKEWED_FROM
    options.routing = options.routing or (["uniform"] if quick else ["uniform", "skewed"])
    options.slices = options.slices or (3 if quick else 7)
    options.seconds = options.seconds or (0.1 if quick else 0.25)
    for given, known in ((options.shapes, ("S1", "S2", "S3")), (options.routing, ("uniform", "skewed")),
                         (options.peers, PEERS), (options.types or [], work.TYPES)):  # fmt: skip
        for name in given:
            if name not in known:
                parser.error(f"found {name!r}, expected some of {','.join(known)}")
    return options


def layer(bench: Bench, probe: Child, shape: work.Shape, name: str) -> None:
    options = bench.options
    if reason := work.missing(name):
        bench.lacks("all", reason, name)
        return
    job, values = work.make(shape, name, options.threads, max(options.tokens), options.quick)
    bench.say(f"{shape.name} {name}: H{job.hidden} I{job.inner} E{job.experts}, {job.layers} layers of "
              f"{job.experts * job.expert_bytes / 1e6:.0f} MB")  # fmt: skip
    peers = start(bench, job, values, f"{shape.name} {name}")
    try:
        for tokens in options.tokens:
            for routing in options.routing:
                if routing == "skewed" and tokens < options.skewed_from:
                    continue
                one = work.case(job, tokens, routing)
                cell(bench, probe, peers, job, shape.name, one, routing, work.reference(job, values, one))
                save(bench)
    finally:
        for child, _ in peers.values():
            child.close()


def main() -> None:
    options = parse()
    console = Console(width=None if sys.stdout.isatty() else 170)
    say = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    if options.isa:
        native.set_isa(options.isa)
    bench = Bench(options, native.isa(), say, pathlib.Path())
    for peer, reason in environment.prepare(options.peers, bench.isa, options.jobs, say).items():
        bench.lacks(peer, reason, "all")
        options.peers.remove(peer)
    if options.build_only:
        return
    torch.set_num_threads(options.threads)
    known = work.shapes(work.memory_bytes())
    types = options.types or [t for t in (QUICK_TYPES if options.quick else TYPES) if offered(t)]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        bench.folder = pathlib.Path(folder)
        probe = Child("ours", bench.isa, options.threads, options.pages == "huge", bench.folder)
        stack.callback(probe.close)
        probe.ask("probe", [], options.threads)
        probe.stop()
        try:
            for shape in options.shapes:
                chosen = known[shape]
                if options.experts:
                    chosen = replace(chosen, experts=options.experts)
                for name in types:
                    layer(bench, probe, chosen, name)
        except KeyboardInterrupt:
            say("interrupted; what was measured so far:")
    save(bench)
    report(bench, console)


if __name__ == "__main__":
    main()
