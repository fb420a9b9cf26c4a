"""Time from `git clone` to the first answer, by parts: `make bench-setup`, or `python tests/bench/bench_setup.py`.

Clones this repository's last commit into a temporary folder and types what the README says. pip and the C compiler work
at the same time, so the parts overlap: each line says when a part was done, and `took` is since what it waited for.
CPU seconds vary less than wall time where others use the machine. PIP_ARGS (an index nearby, say) reaches pip.
`--isas` then compiles the library once more, one instruction set after the other, and says what each costs.
Needs only Python's own library.
"""

import argparse
import json
import os
import resource
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
QUESTION = "What is a rule file?\n"


def run(*command: str, cwd: Path, question: str | None = None) -> dict[str, float]:
    """Run a command; its wall and CPU seconds (user and system, of all its processes)."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    ran = subprocess.run(command, cwd=cwd, input=question, text=True, stdout=subprocess.PIPE, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if ran.returncode:
        sys.exit(f"error: {' '.join(command)}: exit {ran.returncode}; what it printed is above.\n{ran.stdout[-2000:]}")
    if question and not ran.stdout.strip():
        sys.exit(f"error: {' '.join(command)}: no answer on standard output.")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"start": start, "wall_s": time.time() - start, "cpu_s": cpu}


def first_answer(folder: Path) -> dict[str, dict[str, float]]:
    """Parts of the way to the first answer: `at_s` (since the start), `took_s`, and `cpu_s` where it is known."""
    clone = run("git", "clone", "--quiet", f"file://{ROOT}", str(folder), cwd=ROOT)
    setup = run("make", "setup", cwd=folder)
    answer = run("make", "chat", cwd=folder, question=QUESTION)
    again = run("make", "chat", cwd=folder, question=QUESTION)
    begin = clone["start"]

    def done(path: str) -> float:
        return (folder / path).stat().st_mtime - begin

    cloned, packages, compiled = clone["wall_s"], done(".venv/.installed"), done("build/clib/.compiled")
    linked, end = done(".venv/.native"), answer["start"] + answer["wall_s"] - begin
    return {
        "clone": {"at_s": cloned, "took_s": cloned, "cpu_s": clone["cpu_s"]},
        "packages (venv, pip)": {"at_s": packages, "took_s": packages - cloned},
        "C library compiled": {"at_s": compiled, "took_s": compiled - cloned},
        "linked, installed": {"at_s": linked, "took_s": linked - max(packages, compiled)},
        "these three (make setup)": {"at_s": linked, "took_s": setup["wall_s"], "cpu_s": setup["cpu_s"]},
        "first answer": {"at_s": end, "took_s": answer["wall_s"], "cpu_s": answer["cpu_s"]},
        "the same again": {"took_s": again["wall_s"], "cpu_s": again["cpu_s"]},
    }


def instruction_sets(folder: Path) -> dict[str, dict[str, float]]:
    """What compiling each library of setup.py costs, in CPU seconds."""
    os.chdir(folder)
    setup = runpy.run_path("setup.py")
    found = {}
    for part in setup["libraries"](build=setup["wanted_build"]()):
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
        setup["compile_objects"]([part], Path("build", "bench"))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        found[part[0].removeprefix("kt_")] = {"took_s": time.time() - start, "cpu_s": cpu}
    return found


def show(title: str, parts: dict[str, dict[str, float]]) -> None:
    print(f"{title:28}{'done at':>9}{'took':>9}{'CPU':>9}   seconds")
    for name, part in parts.items():
        cells = (f"{part[key]:9.1f}" if key in part else " " * 9 for key in ("at_s", "took_s", "cpu_s"))
        print(f"{name:28}{''.join(cells)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--isas", action="store_true", help="also the cost of each instruction set")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures there")
    options = parser.parse_args()
    if options.json:
        options.json = options.json.resolve()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    result: dict[str, object] = {"cores": cores, "kt_build": os.environ.get("KT_BUILD", "")}
    with tempfile.TemporaryDirectory(prefix="kt-setup-") as temporary:
        folder = Path(temporary, "ktransformers")
        result["parts"] = parts = first_answer(folder)
        show(f"on {cores} cores", parts)
        if options.isas:
            result["instruction_sets"] = found = instruction_sets(folder)
            show("C library", found)
        os.chdir(ROOT)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
