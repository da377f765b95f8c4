"""Compiles the fuzz of the C kernels with sanitizers and, as a script, runs it.

    python tests/c_driver/build.py --seconds 60 --seed 1

Commands and flags of the kernels are those of setup.py; objects lie in build/sanitized/.
"""

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FOLDER = Path("build", "sanitized")  # from ROOT
SANITIZE = "-g -fsanitize=address,undefined -fno-sanitize-recover=all".split()


def load_setup():
    """setup.py as a module, for its flags and its rule of what to compile again."""
    spec = importlib.util.spec_from_file_location("wce_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def find_compiler():
    return load_setup().find_compiler("CC", "cc", "gcc", "clang")


def has_sanitizers():
    """Whether a program can be compiled and linked with them."""
    command = [*find_compiler(), *SANITIZE, "-x", "c", "-", "-o", "/dev/null"]
    program = "int main(void) { return 0; }"
    return not subprocess.run(command, input=program, text=True, capture_output=True).returncode


def build():
    """Returns the path of the program. The working folder has to be ROOT."""
    setup = load_setup()
    # Kernels with -O0: an access that an optimiser takes away is not seen, and it compiles quickly.
    jobs = [([*command, "-O0", *SANITIZE], source) for command, source in setup.c_commands()]
    driver = [*find_compiler(), *setup.C_FLAGS.split(), "-Icsrc", "-O1", *SANITIZE]
    jobs += [(driver, source.relative_to(ROOT)) for source in sorted(HERE.glob("*.c"))]
    objects = [FOLDER / f"{source}.o" for _, source in jobs]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job, obj: setup.compile_object(*job, obj, force=False), jobs, objects))
    program = FOLDER / "fuzz"
    link = [*find_compiler(), *SANITIZE, *map(str, objects), "-lm", "-o", str(program)]
    subprocess.run(link, check=True)
    return program


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(subprocess.run([build(), *sys.argv[1:]]).returncode)
