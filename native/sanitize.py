"""Build the whole C library with sanitizers and run what native/test holds: `python native/sanitize.py [--threads]`.

Default: AddressSanitizer and UndefinedBehaviorSanitizer; all kernels on all instruction sets of this machine
(sanitize.c), then random calls for a few seconds (fuzz.c).
--threads: ThreadSanitizer; the pool, the queue and gradients (races.c, and the part of sanitize.c about the pool), and
random calls.
Warnings are errors here, and only here: a user's newer compiler must not fail to build for a new warning.
Needs nothing but a C compiler; flags come from the one table in setup.py.
"""

import argparse
import os
import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CHECKS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
RACES = ["-fsanitize=thread"]


PROGRAMS = {False: (["sanitize"], ["fuzz", "8"]), True: (["races"], ["sanitize", "pool"], ["fuzz", "10"])}
"""What to run, with arguments: native/test/<first>.c; races or not."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", action="store_true", help="ThreadSanitizer on what threads share instead")
    races = parser.parse_args().threads

    os.chdir(ROOT)
    setup = runpy.run_path("setup.py")
    build = Path("build", "tsan" if races else "asan")
    # -g1: lines are enough for a report; variables cost half of the minutes that the largest kernels take to compile
    flags = [*(RACES if races else CHECKS), "-O1", "-g1", "-fno-omit-frame-pointer", "-Werror"]
    programs = PROGRAMS[races]
    library = setup["libraries"](build=setup["wanted_build"]())
    depends = {"": [__file__, *map(str, Path("native/test").glob("*.h")), *library[0][1]["obj_deps"][""]]}
    tests = {"cflags": ["-std=gnu11", "-Wall", "-Wextra"], "macros": [], "obj_deps": depends}
    parts = [(name, {**tests, "sources": [f"native/test/{name}.c"]}) for name, *_ in programs]
    objects = setup["compile_objects"]([*library, *parts], build, flags)
    kernels = [path for name, _ in library for path in objects[name]]
    for name, *arguments in programs:
        program = build / name
        command = [*setup["c_compiler"](), *flags, *objects[name], *kernels, "-o", program, "-lpthread", "-lm"]
        subprocess.run(command, check=True)
        code = subprocess.run([str(program), *arguments], check=False).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
