"""Build the whole C library with sanitizers and run what native/test holds: `python native/sanitize.py [--threads]`.

Default: AddressSanitizer and UndefinedBehaviorSanitizer; all kernels on all instruction sets of this machine
(sanitize.c), then random calls for a few seconds (fuzz.c).
--threads: ThreadSanitizer; the pool and the queue (races.c, and the part of sanitize.c about the pool).
Warnings are errors here, and only here: a user's newer compiler must not fail to build for a new warning.
Needs nothing but a C compiler; flags come from the one table in setup.py.
"""

import argparse
import os
import runpy
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
CHECKS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
RACES = ["-fsanitize=thread"]


PROGRAMS = {False: (["sanitize"], ["fuzz", "8"]), True: (["races"], ["sanitize", "pool"])}
"""What to run, with arguments: native/test/<first>.c; races or not."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", action="store_true", help="ThreadSanitizer on the pool and the queue instead")
    races = parser.parse_args().threads

    os.chdir(ROOT)
    build = Path("build", "tsan" if races else "asan")
    compiler = (sysconfig.get_config_var("CC") or "cc").split()
    # -g1: lines are enough for a report; variables cost half of the minutes that the largest kernels take to compile
    flags = [*(RACES if races else CHECKS), "-O1", "-g1", "-fno-omit-frame-pointer", "-Werror"]
    programs = PROGRAMS[races]
    tests = [(f"native/test/{name}.c", ["-std=gnu11", "-Wall", "-Wextra"], []) for name, *_ in programs]
    library_jobs, newest_header = [], 0.0
    for _, library in runpy.run_path("setup.py")["libraries"]():
        library_jobs += [(source, library["cflags"], library["macros"]) for source in library["sources"]]
        newest_header = max(newest_header, *(Path(h).stat().st_mtime for h in library["obj_deps"][""]))

    def compile_one(job: tuple[str, list[str], list[tuple[str, str]]]) -> str:
        source, own, macros = job
        out = build / (source.replace("/", "_") + ".o")
        newest = max(newest_header, Path(source).stat().st_mtime, Path(__file__).stat().st_mtime)
        if not out.exists() or out.stat().st_mtime < newest:
            defines = [f"-D{name}={value}" for name, value in macros]
            subprocess.run([*compiler, *own, *defines, *flags, "-c", source, "-o", str(out)], check=True)
        return str(out)

    build.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, [*tests, *library_jobs]))
    for i, (name, *arguments) in enumerate(programs):
        program, own, library = build / name, objects[i], objects[len(programs) :]
        subprocess.run([*compiler, *flags, own, *library, "-o", str(program), "-lpthread", "-lm"], check=True)
        code = subprocess.run([str(program), *arguments], check=False).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
