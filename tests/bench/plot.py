"""Plots of what `make bench-peers`, `bench` or `bench-whole` wrote as JSON: `python -m tests.bench.plot FILE... [--out FOLDER]`.

NAME-roofline.png: achieved against limit. Every cell has limits measured in its own seconds, so the axes are relative to them: x is
the operations a call does for each byte it reads, 1 where bandwidth and multiplier take equally long; y is the speed as a
share of the multiplier's peak. NAME-ratios.png: the fastest peer's time over ours, by type, shape and tokens.
NAME-whole.png, of whole models: tokens/s of both engines over the length of a prompt, the depth of decoding and the sequences
of a batch.
matplotlib is no dependency of the project: where it is missing, .venv-peers gets it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pathlib
import sys
from typing import Any

from tests.bench.peers import environment

MATPLOTLIB = "matplotlib==3.10.*"
PANELS = {
    "ours": ("ours",),
    "llama.cpp": ("llama", "llama-repack"),
    "upstream": ("upstream",),
    "torch (bf16)": ("torch",),
}
DPI = 110


def family(name: str) -> str:
    if name.startswith(("IQ", "TQ")):
        return "IQ, TQ"
    if "FP8" in name:
        return "FP8"
    if "FP4" in name:
        return "FP4"
    if name in ("BF16", "F16", "F32"):
        return "floats"
    return "Q8_0, INT8" if name in ("Q8_0", "AMXINT8") else "Q2 to Q6, INT4"


COLORS = {"Q2 to Q6, INT4": "tab:blue", "Q8_0, INT8": "tab:cyan", "IQ, TQ": "tab:orange", "FP8": "tab:red",
          "FP4": "tab:purple", "floats": "tab:green"}  # fmt: skip


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a JSON file with the figures that both plots need. Raises SystemExit with what is missing."""
    try:
        rows = json.loads(path.read_text())["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{path}: {error!r}; expected the --json file of bench_peers, bench_native or bench_whole.") from None
    if rows and "work" in rows[0]:
        return rows
    out = []
    for row in rows:
        row.setdefault("peer", "ours")
        if not row.get("error", 0.0) < 0.5:  # NaN included: what computes something else is not drawn
            continue
        if all(row.get(key) for key in ("ops", "bytes", "read_gbs", "peak_gops", "us")):
            out.append(row)
    if not out:
        raise SystemExit(f"{path}: no row has ops, bytes, read_gbs, peak_gops and us.")
    return out


def point(row: dict[str, Any]) -> tuple[float, float]:
    """(intensity over the ridge's, speed over peak)."""
    intensity = row["ops"] / row["bytes"] * row["read_gbs"] / row["peak_gops"]
    return intensity, row["ops"] / row["us"] / 1e3 / row["peak_gops"]


def roofline(rows: list[dict[str, Any]], title: str, out: pathlib.Path) -> None:
    import matplotlib.pyplot as plt

    panels = {name: [r for r in rows if r["peer"] in peers] for name, peers in PANELS.items()}
    panels = {name: found for name, found in panels.items() if found}
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3.4 * len(panels) + 1, 4.2), sharex=True, sharey=True, squeeze=False
    )
    xs = [point(r)[0] for r in rows]
    low, high = min(xs) / 1.5, max(max(xs), 1) * 1.5
    for axis, (name, found) in zip(axes[0], panels.items(), strict=True):
        axis.plot([low, 1, high], [low, 1, 1], color="black", linewidth=1.2)
        axis.plot([low, 1, high], [low / 2, 0.5, 0.5], color="black", linewidth=0.6, linestyle=":")
        for label, color in COLORS.items():
            points = [point(r) for r in found if family(r["type"]) == label]
            if points:
                axis.scatter(*zip(*points, strict=True), s=13, color=color, alpha=0.75, linewidths=0, label=label)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.2)
        axis.set_xlabel("operations a byte, over the ridge's", fontsize=8)
    axes[0][0].set_ylabel("speed, share of the multiplier's peak", fontsize=8)
    handles = {text: h for a in axes[0] for h, text in zip(*a.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=len(handles), fontsize=8, frameon=False)
    figure.suptitle(f"{title}: achieved against limit (solid; dotted: half of it)", fontsize=10)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(out, dpi=DPI)


def ratios(rows: list[dict[str, Any]], title: str, out: pathlib.Path) -> bool:
    """False where there is nothing to compare."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import TwoSlopeNorm

    best: dict[tuple[str, str, int], tuple[float, str]] = {}
    for r in rows:
        if r["peer"] == "ours" or not r.get("ratio") or r.get("routing", "uniform") != "uniform":
            continue
        key = (r["type"], r["shape"], r["tokens"])
        best[key] = min(best.get(key, (1e9, "")), (r["ratio"], r["peer"]))
    if not best:
        return False
    types = list(dict.fromkeys(t for t, _, _ in best))
    columns = sorted({(s, n) for _, s, n in best})
    grid = [[best.get((t, *c), (float("nan"), ""))[0] for c in columns] for t in types]
    figure, axis = plt.subplots(figsize=(0.62 * len(columns) + 2, 0.3 * len(types) + 1.6))
    axis.imshow(grid, cmap="RdYlGn", norm=TwoSlopeNorm(1.0, 0.4, 4.0), aspect="auto")
    for y, name in enumerate(types):
        for x, column in enumerate(columns):
            ratio, peer = best.get((name, *column), (0.0, ""))
            if peer:
                axis.text(x, y, f"{ratio:.1f}{peer[0]}", ha="center", va="center", fontsize=7)
    axis.set_xticks(range(len(columns)), [f"{s}\nT={n}" for s, n in columns], fontsize=7)
    axis.set_yticks(range(len(types)), types, fontsize=7)
    axis.set_title(f"{title}: fastest peer's time / ours (l llama.cpp, u upstream, t torch)", fontsize=8)
    figure.tight_layout()
    figure.savefig(out, dpi=DPI)
    return True


WORKS = {"prefill": "tokens of the prompt", "decode": "tokens in the cache", "batch": "sequences"}


def whole(rows: list[dict[str, Any]], title: str, out: pathlib.Path) -> None:
    """A line of panels for each model and type: a panel for each kind of work, tokens/s of both engines in it."""
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys((row["model"], row["type"]) for row in rows))
    works = [work for work in WORKS if any(row["work"] == work for row in rows)]
    size = (3.4 * len(works), 2.4 * len(cases))
    figure, panels = plt.subplots(len(cases), len(works), figsize=size, squeeze=False)
    for line, (model, kind) in zip(panels, cases, strict=True):
        for axis, work in zip(line, works, strict=True):
            some = [row for row in rows if (row["model"], row["type"], row["work"]) == (model, kind, work)]
            for engine, color in (("ours", "tab:blue"), ("llama", "tab:gray")):
                points = [(row["tokens"], row[engine]) for row in some if row.get(engine)]
                if points:
                    axis.plot(*zip(*points, strict=True), "o-", color=color, label={"llama": "llama.cpp"}.get(engine, engine))
            axis.set_xscale("log", base=2)
            axis.set_ylim(bottom=0)
            axis.set_title(f"{model} {kind}, {work}", fontsize=7)
            axis.set_xlabel(WORKS[work], fontsize=7)
            axis.set_ylabel("tokens/s", fontsize=7)
            axis.tick_params(labelsize=6)
            axis.legend(fontsize=6)
    figure.suptitle(title, fontsize=8)
    figure.tight_layout()
    figure.savefig(out, dpi=DPI)


def with_matplotlib() -> None:
    """Go on in an interpreter that has matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        if os.environ.get("KT_PLOT_AGAIN"):
            raise SystemExit("error: matplotlib does not import although it was installed into .venv-peers.")
        try:
            environment.package(MATPLOTLIB)
        except (environment.Failed, OSError) as error:
            raise SystemExit(f"error: no matplotlib: {error}") from None
        os.environ["KT_PLOT_AGAIN"] = "1"
        os.execv(environment.python(), [environment.python(), "-m", "tests.bench.plot", *sys.argv[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=pathlib.Path, help="JSON of bench_peers, bench_native or bench_whole")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent, help="folder of the PNGs")
    options = parser.parse_args()
    with_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    options.out.mkdir(parents=True, exist_ok=True)
    for path in options.files:
        rows = read(path)
        if "work" in rows[0]:
            target = options.out / f"{path.stem}-whole.png"
            whole(rows, path.stem, target)
            print(target)
            continue
        isas = ", ".join(dict.fromkeys(r.get("isa", "") for r in rows))
        target = options.out / f"{path.stem}-roofline.png"
        roofline(rows, isas, target)
        print(target)
        target = options.out / f"{path.stem}-ratios.png"
        if ratios(rows, isas, target):
            print(target)


if __name__ == "__main__":
    main()
