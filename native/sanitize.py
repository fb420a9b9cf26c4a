"""Build the whole C library with sanitizers and run native/test/sanitize.c: `python native/sanitize.py [--threads]`.

Default: AddressSanitizer and UndefinedBehaviorSanitizer, all kernels on all instruction sets of this machine.
--threads: ThreadSanitizer on the pool (without fork, which it cannot follow).
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", action="store_true", help="ThreadSanitizer on the pool instead")
    races = parser.parse_args().threads

    os.chdir(ROOT)
    build = Path("build", "tsan" if races else "asan")
    compiler = (sysconfig.get_config_var("CC") or "cc").split()
    flags = [*(RACES if races else CHECKS), "-O1", "-g", "-fno-omit-frame-pointer", "-Werror"]
    jobs = [("native/test/sanitize.c", ["-std=gnu11", "-Wall", "-Wextra"], [])]
    newest_header = 0.0
    for _, library in runpy.run_path("setup.py")["libraries"]():
        jobs += [(source, library["cflags"], library["macros"]) for source in library["sources"]]
        newest_header = max(newest_header, *(Path(h).stat().st_mtime for h in library["obj_deps"][""]))

    def compile_one(job: tuple[str, list[str], list[tuple[str, str]]]) -> Path:
        source, own, macros = job
        out = build / (source.replace("/", "_") + ".o")
        newest = max(newest_header, Path(source).stat().st_mtime, Path(__file__).stat().st_mtime)
        if not out.exists() or out.stat().st_mtime < newest:
            defines = [f"-D{name}={value}" for name, value in macros]
            subprocess.run([*compiler, *own, *defines, *flags, "-c", source, "-o", str(out)], check=True)
        return out

    build.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [str(o) for o in pool.map(compile_one, jobs)]
    program = build / "sanitize"
    subprocess.run([*compiler, *flags, *objects, "-o", str(program), "-lpthread", "-lm"], check=True)
    return subprocess.run([str(program), *(["pool"] if races else [])], check=False).returncode


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
