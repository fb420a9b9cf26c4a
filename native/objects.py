"""Compile the C library's objects and nothing else: `python native/objects.py`.

Needs neither setuptools nor cffi, so that `make setup` does it while pip installs; setup.py finds the objects where
they are. Table, flags and compiler come from there.
"""

import os
import runpy
import subprocess
import sys
import time
from pathlib import Path


def main() -> int:
    os.chdir(Path(__file__).parents[1])
    build = runpy.run_path("setup.py")
    what = build["wanted_build"]()
    parts = build["libraries"](build=what)
    names = ", ".join(name.removeprefix("kt_") for name, _ in parts[1:])
    print(f"C library: compiling for {build['BUILDS'][what]} ({names or 'portable C only'})", flush=True)
    start = time.monotonic()
    build["compile_objects"](parts)
    print(f"C library: compiled in {time.monotonic() - start:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
