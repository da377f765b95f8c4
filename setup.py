"""Builds wce_torch._C from C kernels, C++ glue and, where wanted, CUDA kernels.

Every object is compiled here, by one rule, and linked by setuptools, so in-place, wheel and
editable builds run the same commands, with or without ninja. An object is compiled again when its
command line, or a file that it included last time, has changed. The objects lie in
build/temp.<platform>-<python>/csrc/, each with its command line (.cmd) and included files (.d).

Environment
  CC, CXX               compilers of C and C++
  MAX_JOBS              compile jobs at a time; default: one per processor
  WCE_WERROR=1          warnings are errors
  WCE_CUDA=0|1          never / always with CUDA; default: if nvcc is there and torch has CUDA
  TORCH_CUDA_ARCH_LIST  such as "8.0;9.0+PTX"
"""

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

PYTHON_MIN, TORCH_MIN, TORCH_TRIED = (3, 10), (2, 11), "2.13.0"
SETUPTOOLS_WITH_WHEEL = (70, 1)

# csrc/cpu/<name>_<key>.c is compiled with the flags of its key, other C files with those of base.
# They name no more than csrc/cpu/dispatch.c asks the processor for; base, with -mno-avx, runs on
# every x86-64. Other processors get base alone.
ISA_FLAGS = {
    "base": "-mno-avx",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c"
    " -mprefer-vector-width=512",
}
X86 = platform.machine().lower() in ("x86_64", "amd64")

# No flag here may change a result: sums are written in the order in which they are meant.
C_FLAGS = (
    "-std=c11 -O3 -ffp-contract=off -fno-math-errno -fno-trapping-math"
    " -fvisibility=hidden -fPIC -Wall -Wextra"
)
# -fopenmp: at::parallel_for is serial without it. Not linked: torch brings its own OpenMP library.
CXX_FLAGS = "-O2 -g0 -fvisibility=hidden -fPIC -fopenmp -Wall -Wextra"
NVCC_FLAGS = "-O3 -std=c++17 -Xcompiler=-fPIC,-fvisibility=hidden,-Wall"
WERROR = os.environ.get("WCE_WERROR") == "1"


def fail(problem, remedy):
    sys.exit(f"\nwce_torch cannot be built: {problem}\nWhat to do: {remedy}\n")


def output_of(*command):
    return subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout


# ---- what is installed ------------------------------------------------------------------------


def find_compiler(variable, *names):
    """The command in $variable, or the first of names that is installed, as a list of words."""
    wish = shlex.split(os.environ.get(variable, ""))
    for command in [wish] if wish else [[name] for name in names]:
        if shutil.which(command[0]):
            return command
    fail(
        f"no compiler found ({' '.join(wish) or ' or '.join(names)})",
        "install gcc and g++ 11 or newer (Debian and Ubuntu: apt install build-essential;"
        f" Fedora: dnf install gcc gcc-c++), or set {variable} to a compiler.",
    )


def check_setuptools():
    """What setuptools says here itself, "invalid command 'bdist_wheel'", helps nobody."""
    if not {"dist_info", "bdist_wheel"} & set(sys.argv):
        return
    version = tuple(int(n) for n in setuptools.__version__.split(".")[:2])
    if version < SETUPTOOLS_WITH_WHEEL and not importlib.util.find_spec("wheel"):
        fail(
            f"setuptools {setuptools.__version__} makes no wheel without the package wheel",
            'pip install "setuptools>=70.1,<82"  (torch 2.11 and 2.12 refuse newer ones)',
        )


def import_torch():
    try:
        import torch
    except ImportError as error:
        fail(
            f"{sys.executable} cannot import torch ({error})",
            f"pip install torch=={TORCH_TRIED}, then give pip --no-build-isolation, so that the"
            " build sees that torch.",
        )
    if tuple(int(n) for n in torch.__version__.split(".")[:2]) < TORCH_MIN:
        fail(
            f"torch {torch.__version__} is older than {'.'.join(map(str, TORCH_MIN))}",
            f"pip install torch=={TORCH_TRIED}",
        )
    return torch


def find_nvcc():
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    found = [shutil.which(f"{home}/bin/nvcc") for home in homes if home] + [shutil.which("nvcc")]
    return next(filter(None, found), None)


def decide_cuda(torch):
    """The path of nvcc, or None for a build without CUDA. Says which, and why."""
    wish, nvcc = os.environ.get("WCE_CUDA") or None, find_nvcc()
    if wish not in (None, "0", "1"):
        fail(f"WCE_CUDA={wish} is neither 0 nor 1", "set it to 0 or 1, or unset it.")
    if wish == "1" and not nvcc:
        fail(
            "WCE_CUDA=1, but nvcc was not found",
            "install the CUDA toolkit and set CUDA_HOME to its folder, or unset WCE_CUDA.",
        )
    if wish:
        use, why = wish == "1", f"WCE_CUDA={wish}"
    elif not torch.version.cuda:
        use, why = False, "this torch has no CUDA; WCE_CUDA=1 would build it all the same"
    else:
        use, why = bool(nvcc), nvcc or "nvcc was not found; is CUDA_HOME set?"
    print(f"wce_torch: building {'with' if use else 'without'} CUDA ({why})", flush=True)
    return nvcc if use else None


def cuda_archs(nvcc):
    """Architectures such as ["75", "90a", "120+PTX"].

    Default: the lowest of each generation that nvcc knows, from 75 on (its code runs on the whole
    generation), and PTX of the last for processors still to come.
    """
    known = set(map(int, re.findall(r"compute_(\d+)", output_of(nvcc, "--list-gpu-arch"))))
    wish = re.split(r"[;, ]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip("; "))
    if wish != [""]:
        return wanted_archs(wish, known)
    lowest = {}
    for arch in sorted(known):
        if arch >= 75:
            lowest.setdefault(arch // 10, str(arch))
    archs = list(lowest.values())
    return archs[:-1] + [archs[-1] + "+PTX"]


def wanted_archs(wish, known):
    """What TORCH_CUDA_ARCH_LIST names, each once."""
    archs = {}
    for arch in wish:
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        if not found:
            fail(
                f"{arch!r} in TORCH_CUDA_ARCH_LIST is not understood",
                'write numbers, such as "8.0;9.0+PTX", or unset it.',
            )
        major, minor, suffix, ptx = found.groups()
        if int(major + minor) not in known:
            fail(
                f"this nvcc does not know {arch} of TORCH_CUDA_ARCH_LIST",
                f"choose from {', '.join(f'{n // 10}.{n % 10}' for n in sorted(known))}, or"
                " install a CUDA toolkit that knows it.",
            )
        number = major + minor + suffix
        archs[number] = archs.get(number) or ptx or ""
    return [number + ptx for number, ptx in archs.items()]


def cuda_library_dirs(nvcc):
    """Where nvcc would look for libraries: nvcc may be a link, or a script that calls another."""
    plan = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True,
                          text=True).stderr
    return re.findall(r'"-L([^"]+)"', plan)


# ---- command lines: pairs of (command, source) -------------------------------------------------


def sources(pattern):
    return sorted(Path("csrc").glob(pattern))


def c_commands():
    cc = find_compiler("CC", "cc", "gcc", "clang") + C_FLAGS.split() + ["-Werror"] * WERROR
    for source in sources("cpu/*.c"):
        suffix = source.stem.rpartition("_")[2]
        isa = suffix if suffix in ISA_FLAGS else "base"
        if X86:
            yield [*cc, *ISA_FLAGS[isa].split(), "-Icsrc"], source
        elif isa == "base":
            yield [*cc, "-Icsrc"], source


def cxx_commands(torch, build_facts):
    from torch.utils.cpp_extension import include_paths

    python_include = sysconfig.get_path("include")
    if not Path(python_include, "Python.h").exists():
        fail(
            f"Python.h is not in {python_include}",
            "install Python's development files (Debian and Ubuntu: apt install python3-dev;"
            " Fedora: dnf install python3-devel).",
        )
    newest = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 13)
    command = [
        *find_compiler("CXX", "c++", "g++", "clang++"),
        *CXX_FLAGS.split(),
        "-std=c++20" if newest else "-std=c++17",
        *["-Werror"] * WERROR,
        "-Icsrc",
        *(f"-isystem{path}" for path in [*include_paths(), python_include]),
        "-DTORCH_EXTENSION_NAME=_C",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(f"-DWCE_BUILD_{key}={value}" for key, value in build_facts.items()),
    ]
    for source in sources("torch/*.cpp"):
        if build_facts["CUDA"] or not source.stem.endswith("_cuda"):
            yield command, source


def cuda_commands(nvcc, archs):
    command = [nvcc, *NVCC_FLAGS.split(), "-Icsrc"]
    for arch in archs:
        number, _, ptx = arch.partition("+")
        command.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if ptx:
            command.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    if "--compress-mode" in output_of(nvcc, "--help"):  # a third of the size, in the same time
        command.append("--compress-mode=size")
    if WERROR:
        command.append("-Werror=all-warnings")
    for source in sources("cuda/*.cu"):
        yield command, source


# ---- objects ----------------------------------------------------------------------------------


def is_current(obj, line):
    """Whether obj was made by this command line and is newer than all that it included."""
    try:
        if Path(f"{obj}.cmd").read_text() != line:
            return False
        made = os.stat(obj).st_mtime
        # as make wants it, "target: file file \<newline> file", a blank in a name written "\ "
        included = Path(f"{obj}.d").read_text().replace("\\\n", " ").partition(": ")[2]
        return all(os.stat(name).st_mtime < made for name in shlex.split(included))
    except FileNotFoundError:
        return False


def compile_object(command, source, obj, force):
    command = [*command, "-MD", "-MF", f"{obj}.d", "-c", str(source), "-o", str(obj)]
    line, record = shlex.join(command), Path(f"{obj}.cmd")
    if not force and is_current(obj, line):
        return
    obj.parent.mkdir(parents=True, exist_ok=True)
    record.unlink(missing_ok=True)
    print(f"compile {source}\n", end="", flush=True)  # in one piece: other threads print too
    start = time.time()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, end="", flush=True)
    if done.returncode:
        fail(
            f"{source} does not compile, see the message above. The command was\n{line}",
            "if the compiler does not know a flag or a language standard, install gcc and g++ 11"
            " or newer and set CC and CXX to them; otherwise mend the source.",
        )
    os.utime(obj, (start, start))  # a file that was edited meanwhile is newer than this
    record.write_text(line)


class BuildExt(build_ext):
    def build_extension(self, ext):
        if getattr(self, "editable_mode", False):  # setuptools takes a new folder each time
            tag = f"{self.plat_name}-{sys.implementation.cache_tag}"
            self.build_temp = os.path.join("build", f"temp.{tag}")
        torch = import_torch()
        from torch.utils.cpp_extension import library_paths

        nvcc = decide_cuda(torch)
        commands = list(self.commands(torch, nvcc))
        ext.extra_objects = ext.depends = self.compile_all(commands)
        ext.library_dirs = library_paths()
        ext.libraries = ["c10", "torch", "torch_cpu", "torch_python"]
        if nvcc:
            ext.library_dirs += cuda_library_dirs(nvcc)
            ext.libraries += ["cudart_static", "dl", "pthread", "rt"]
        super().build_extension(ext)  # links, if an object is newer than the library

    def commands(self, torch, nvcc):
        archs = cuda_archs(nvcc) if nvcc else []
        release = re.findall(r"release ([\d.]+)", output_of(nvcc, "--version")) if nvcc else []
        facts = {
            "VERSION": self.distribution.get_version(),
            "TORCH": torch.__version__,
            "CUDA_ARCHS": ",".join(archs),
            "NVCC": "".join(release),
        }
        facts = {key: f'"{value}"' for key, value in facts.items()} | {"CUDA": int(bool(nvcc))}
        yield from c_commands()
        yield from cxx_commands(torch, facts)
        if nvcc:
            yield from cuda_commands(nvcc, archs)

    def compile_all(self, commands):
        """Compiles what is not current; returns all objects."""
        objects = [Path(self.build_temp, f"{source}.o") for _, source in commands]
        jobs = int(os.environ.get("MAX_JOBS") or 0) or os.cpu_count() or 1
        with ThreadPoolExecutor(jobs) as pool:
            results = [
                pool.submit(compile_object, command, source, obj, self.force)
                for (command, source), obj in zip(commands, objects)
            ]
            try:
                for result in results:
                    result.result()
            finally:
                pool.shutdown(cancel_futures=True)
        return [str(obj) for obj in objects]


def main():
    if sys.version_info < PYTHON_MIN:
        fail(
            f"Python {platform.python_version()} is older than {'.'.join(map(str, PYTHON_MIN))}",
            "use a newer Python, for example: make PYTHON=python3.11",
        )
    check_setuptools()
    library = Extension(
        "wce_torch._C",
        sources=[],
        language="c++",
        extra_link_args=["-Wl,--exclude-libs,ALL", "-Wl,--gc-sections"],
    )
    setup(ext_modules=[library], cmdclass={"build_ext": BuildExt})


if __name__ == "__main__":
    main()
