"""What setup.py builds, what it builds again, and what it says when it cannot.

The rules of the build are tried on a tree of a few tiny files, which takes seconds; what the
objects hold is read from those that the last build of this project left in build/temp.*.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from c_driver.build import ROOT, load_setup

X86 = load_setup().X86
ISAS = list(load_setup().ISA_FLAGS) if X86 else ["base"]
TEMP = Path("build", f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}")


def output_of(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


# ---- what the objects hold --------------------------------------------------------------------


def kernel_object(name):
    obj = ROOT / TEMP / "csrc" / "cpu" / f"{name}.c.o"
    if not obj.exists():
        pytest.skip(f"{obj} is missing: build with 'python setup.py build_ext --inplace'")
    return obj


def instructions(obj):
    """Lines such as "vaddps %ymm1,%ymm2,%ymm3"."""
    text = output_of("objdump", "-d", "--no-show-raw-insn", obj)
    return re.findall(r"^\s*[0-9a-f]+:\s+(\S.*)$", text, re.MULTILINE)


@pytest.mark.parametrize("name", ISAS)
def test_instruction_set_exports_one_symbol(name):
    symbols = output_of("nm", "--defined-only", "--extern-only", kernel_object(f"kernels_{name}"))
    assert [line.split()[-1] for line in symbols.splitlines()] == [f"wce_kernels_{name}"]


@pytest.mark.parametrize("name", [f"kernels_{isa}" for isa in ISAS] + ["dispatch", "plan"])
def test_kernels_are_compiled_as_c(name):
    obj = kernel_object(name)
    assert "-std=c11" in Path(f"{obj}.cmd").read_text().split()
    mangled = [line for line in output_of("nm", obj).splitlines() if " _Z" in line]
    assert not mangled, "a C++ compiler made this object"


@pytest.mark.skipif(not X86, reason="registers of x86-64")
@pytest.mark.parametrize("name", ["kernels_base", "dispatch", "plan"])
def test_base_runs_on_every_x86_64(name):
    code = instructions(kernel_object(name))
    assert len(code) > 100
    wide = [line for line in code if line.startswith("v") or re.search(r"%[yz]mm", line)]
    assert not wide


@pytest.mark.skipif(not X86, reason="registers of x86-64")
def test_wide_kernels_use_wide_registers():
    avx2, avx512 = (" ".join(instructions(kernel_object(f"kernels_{i}"))) for i in ISAS[1:])
    assert "%ymm" in avx2 and "%zmm" not in avx2
    assert "%zmm" in avx512


def test_library_shows_and_needs_only_what_it_should():
    from wce_torch import _C

    shown = re.findall(r" (\w+)$", output_of("nm", "-D", "--defined-only", _C.__file__), re.M)
    assert "PyInit__C" in shown
    assert not [name for name in shown if name.startswith("wce_")]
    needed = output_of("objdump", "-p", _C.__file__)
    assert "libtorch_cpu" in needed
    assert not re.search(r"NEEDED\s+lib(gomp|omp|cudart)", needed), "torch brings its own"


# ---- a tiny tree, built by the real setup.py ---------------------------------------------------

TREE = {
    "csrc/wce.h": "int wce_answer(void);\n",
    "csrc/cpu/body.inc": "#define ANSWER 42\n",
    "csrc/cpu/kernels_base.c": '#include "body.inc"\nint wce_base(void) { return ANSWER; }\n',
    "csrc/cpu/kernels_avx2.c": '#include "body.inc"\nint wce_avx2(void) { return ANSWER; }\n',
    "csrc/cpu/dispatch.c": '#include "wce.h"\nint wce_answer(void) { return 42; }\n',
    "csrc/torch/bindings.cpp": """
        #include <Python.h>
        extern "C" {
        #include "wce.h"
        }
        static PyObject *answer(PyObject *, PyObject *) { return PyLong_FromLong(wce_answer()); }
        static PyMethodDef methods[] = {{"answer", answer, METH_NOARGS, nullptr},
                                        {nullptr, nullptr, 0, nullptr}};
        static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", WCE_BUILD_TORCH, -1, methods,
                                     nullptr, nullptr, nullptr, nullptr};
        extern "C" __attribute__((visibility("default"))) PyObject *PyInit__C();
        PyObject *PyInit__C() { return PyModule_Create(&module); }
        """,
    "csrc/torch/ops_cuda.cpp": "#error only with CUDA\n",
    "README.md": "",
}
SOURCES = [name for name in TREE if name.endswith((".c", ".cpp")) and "_cuda" not in name]
SOURCES = [name for name in SOURCES if X86 or "avx" not in name]


@pytest.fixture
def tree(tmp_path):
    for name, text in TREE.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "wce_torch", tmp_path / "wce_torch", ignore=ignored)
    return tmp_path


def run(tree, *command, **environment):
    environment = {"WCE_CUDA": "0", **environment}
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WCE_")}
    return subprocess.run(
        [sys.executable, *command],
        cwd=tree,
        env=clean | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def build(tree, **environment):
    """The sources that a build in place compiled."""
    done = run(tree, "setup.py", "build_ext", "--inplace", **environment)
    assert done.returncode == 0, done.stdout
    return sorted(re.findall(r"^compile (\S+)$", done.stdout, re.MULTILINE))


def test_build_compiles_only_what_changed(tree):
    assert build(tree) == sorted(SOURCES)
    load = "import importlib.machinery as m, importlib.util as u, glob;"
    load += "l = m.ExtensionFileLoader('_C', glob.glob('wce_torch/_C.*.so')[0]);"
    load += "c = u.module_from_spec(u.spec_from_loader('_C', l));"
    assert run(tree, "-c", f"{load} print(c.answer())").stdout == "42\n"

    assert build(tree) == []
    time.sleep(0.02)
    (tree / "csrc/cpu/body.inc").write_text("#define ANSWER 43\n")
    assert build(tree) == [name for name in sorted(SOURCES) if "kernels" in name]
    (tree / "csrc/wce.h").touch()
    assert build(tree) == ["csrc/cpu/dispatch.c", "csrc/torch/bindings.cpp"]
    assert build(tree) == []
    assert build(tree, WCE_WERROR="1") == sorted(SOURCES), "another command line, other objects"
    next(tree.glob("build/temp.*/csrc/cpu/dispatch.c.o")).unlink()
    assert build(tree, WCE_WERROR="1") == ["csrc/cpu/dispatch.c"]


def test_each_file_has_the_flags_of_its_instruction_set(tree):
    build(tree)
    for name in (name for name in SOURCES if name.endswith(".c")):
        command = next(tree.glob(f"build/temp.*/{name}.o.cmd")).read_text().split()
        assert "-ffp-contract=off" in command and "-fvisibility=hidden" in command
        assert ("-mavx2" in command) == ("avx2" in name)
        assert ("-mno-avx" in command) == (X86 and "avx2" not in name)
        assert not any("fast-math" in flag or flag == "-Ofast" for flag in command)


def objects_of(tree):
    found = sorted(tree.glob("build/temp.*/csrc/cpu/*.o"))
    assert found
    return {obj.name: obj.read_bytes() for obj in found}


def test_wheel_holds_the_package_and_the_same_objects(tree):
    build(tree)
    in_place = objects_of(tree)
    shutil.rmtree(tree / "build")
    for library in tree.glob("wce_torch/*.so"):
        library.unlink()
    pip = "-m pip wheel --no-build-isolation --no-deps --no-index -q -w wheels .".split()
    done = run(tree, *pip)
    assert done.returncode == 0, done.stdout
    assert objects_of(tree) == in_place
    with zipfile.ZipFile(next(tree.glob("wheels/wce_torch-*.whl"))) as wheel:
        names = wheel.namelist()
        metadata = wheel.read(next(n for n in names if n.endswith("METADATA"))).decode()
    package = {name for name in names if name.startswith("wce_torch/")}
    source = {f"wce_torch/{p.name}" for p in (ROOT / "wce_torch").iterdir() if p.suffix == ".py"}
    library = f"wce_torch/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    assert package == source | {library, "wce_torch/py.typed", "wce_torch/_C.pyi"}
    assert re.findall("Requires-Dist: (.*)", metadata) == ["torch>=2.11"]


def test_source_archive_builds(tree):
    done = run(tree, "setup.py", "-q", "sdist", "--formats=gztar")
    assert done.returncode == 0, done.stdout
    shutil.unpack_archive(next(tree.glob("dist/*.tar.gz")), tree / "unpacked")
    assert build(next((tree / "unpacked").iterdir())) == sorted(SOURCES)


@pytest.mark.slow
def test_wheel_of_the_whole_project_works(tmp_path):
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "build", ".venv", ".git", "out")
    shutil.copytree(ROOT, tmp_path / "tree", ignore=ignored)
    pip = "-m pip install --no-build-isolation --no-deps --no-index -q --target ../lib .".split()
    done = run(tmp_path / "tree", *pip)
    assert done.returncode == 0, done.stdout
    program = "import torch, wce_torch; print(wce_torch.__file__);"
    program += "print(wce_torch.cross_entropy(torch.zeros(2, 3), torch.tensor([0, 2])).item())"
    done = run(tmp_path, "-c", program, PYTHONPATH=str(tmp_path / "lib"))
    assert done.returncode == 0, done.stdout
    path, loss = done.stdout.splitlines()
    assert path.startswith(str(tmp_path / "lib"))
    assert float(loss) == pytest.approx(1.0986123)


# ---- what it says when it cannot --------------------------------------------------------------


@pytest.mark.parametrize("variable", ["CC", "CXX"])
def test_missing_compiler(tree, variable):
    done = run(tree, "setup.py", "build_ext", "--inplace", **{variable: "no-such-compiler"})
    assert done.returncode != 0
    assert "no compiler found (no-such-compiler)" in done.stdout
    assert "What to do: install gcc and g++" in done.stdout
    assert f"set {variable}" in done.stdout and "Traceback" not in done.stdout


def test_no_compiler_at_all(tree):
    done = run(tree, "setup.py", "build_ext", "--inplace", PATH=str(tree), CC="", CXX="")
    assert done.returncode != 0
    assert "no compiler found (cc or gcc or clang)" in done.stdout


def test_source_that_does_not_compile(tree):
    (tree / "csrc/cpu/dispatch.c").write_text("int broken(void) { return nothing; }\n")
    done = run(tree, "setup.py", "build_ext", "--inplace")
    assert done.returncode != 0
    assert "csrc/cpu/dispatch.c does not compile" in done.stdout
    assert "nothing" in done.stdout and "What to do:" in done.stdout
    assert "Traceback" not in done.stdout


def test_warning_is_an_error_where_asked_for(tree):
    (tree / "csrc/cpu/dispatch.c").write_text("static int unused(void) { return 1; }\n")
    build(tree)
    done = run(tree, "setup.py", "build_ext", "--inplace", WCE_WERROR="1")
    assert done.returncode != 0 and "unused" in done.stdout


def test_python_too_old(monkeypatch):
    build_rules = load_setup()
    monkeypatch.setattr(build_rules, "PYTHON_MIN", (99, 0))
    with pytest.raises(SystemExit, match=r"older than 99\.0[^$]*What to do: .*PYTHON="):
        build_rules.main()


def test_setuptools_that_makes_no_wheel(monkeypatch):
    build_rules = load_setup()
    monkeypatch.setattr(build_rules.setuptools, "__version__", "65.5.0")
    find_spec = build_rules.importlib.util.find_spec
    monkeypatch.setattr(build_rules.importlib.util, "find_spec",
                        lambda name: None if name == "wheel" else find_spec(name))
    monkeypatch.setattr(sys, "argv", ["setup.py", "build_ext"])
    build_rules.check_setuptools()  # makes no wheel
    monkeypatch.setattr(sys, "argv", ["setup.py", "dist_info"])
    with pytest.raises(SystemExit, match=r"setuptools 65\.5\.0 [^$]*What to do: pip install"):
        build_rules.check_setuptools()


def test_torch_too_old(monkeypatch):
    import torch

    monkeypatch.setattr(torch, "__version__", "2.10.2+cpu")
    with pytest.raises(SystemExit, match=r"torch 2\.10\.2\+cpu is older than 2\.11"):
        load_setup().import_torch()


def test_torch_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit, match=r"cannot import torch[^$]*--no-build-isolation"):
        load_setup().import_torch()


# ---- with CUDA or without ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "wish, torch_cuda, nvcc, used",
    [
        (None, "13.0", "/x/nvcc", True),
        (None, "13.0", None, False),
        (None, None, "/x/nvcc", False),
        ("1", None, "/x/nvcc", True),
        ("0", "13.0", "/x/nvcc", False),
    ],
)
def test_cuda_decision(monkeypatch, capsys, wish, torch_cuda, nvcc, used):
    build_rules = load_setup()
    monkeypatch.setattr(build_rules, "find_nvcc", lambda: nvcc)
    monkeypatch.delenv("WCE_CUDA", raising=False)
    if wish:
        monkeypatch.setenv("WCE_CUDA", wish)
    torch = SimpleNamespace(version=SimpleNamespace(cuda=torch_cuda))
    assert build_rules.decide_cuda(torch) == (nvcc if used else None)
    assert f"building {'with' if used else 'without'} CUDA" in capsys.readouterr().out


def test_cuda_wanted_without_nvcc(monkeypatch):
    build_rules = load_setup()
    monkeypatch.setattr(build_rules, "find_nvcc", lambda: None)
    monkeypatch.setenv("WCE_CUDA", "1")
    with pytest.raises(SystemExit, match="nvcc was not found[^$]*CUDA_HOME"):
        build_rules.decide_cuda(SimpleNamespace(version=SimpleNamespace(cuda=None)))


def test_cuda_architectures(monkeypatch, tmp_path):
    build_rules = load_setup()
    nvcc = tmp_path / "nvcc"
    known = "compute_50 compute_75 compute_80 compute_86 compute_90 compute_100 compute_103"
    nvcc.write_text("#!/bin/sh\nprintf '%s\\n' " + known + "\n")
    nvcc.chmod(0o755)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert build_rules.cuda_archs(str(nvcc)) == ["75", "80", "90", "100+PTX"]
    for wish in ("8.0;9.0a+PTX", "8.0 9.0a+PTX", " 8.0;9.0a+PTX; "):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wish)
        assert build_rules.cuda_archs(str(nvcc)) == ["80", "90a+PTX"]
    flags = " ".join(next(build_rules.cuda_commands("echo", ["80", "90a+PTX"]))[0])
    for flag in (
        "arch=compute_80,code=sm_80",
        "arch=compute_90a,code=sm_90a",
        "arch=compute_90a,code=compute_90a",
    ):
        assert f"-gencode={flag}" in flags
    assert "code=compute_80" not in flags
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0;9.0+PTX;9.0a,9.0")
    assert build_rules.cuda_archs(str(nvcc)) == ["90+PTX", "90a"]
    for wish, message in (
        ("Ampere", "'Ampere' in TORCH_CUDA_ARCH_LIST is not understood"),
        ("8.0;12.0", "does not know 12.0 .*\n.*choose from 5.0, 7.5, 8.0, 8.6, 9.0, 10.0, 10.3"),
    ):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wish)
        with pytest.raises(SystemExit, match=message):
            build_rules.cuda_archs(str(nvcc))


def test_cuda_libraries_behind_a_script(tmp_path):
    """nvcc on the path is often a script that calls the real one elsewhere."""
    build_rules = load_setup()
    real = build_rules.find_nvcc()
    if not real:
        pytest.skip("needs nvcc")
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f'#!/bin/sh\nexec {real} "$@"\n')
    nvcc.chmod(0o755)
    folders = build_rules.cuda_library_dirs(str(nvcc))
    assert any(Path(folder, "libcudart_static.a").exists() for folder in folders)


def test_library_reports_how_it_was_built():
    import wce_torch

    facts = wce_torch.build_info()
    assert facts["version"] == wce_torch.__version__
    assert re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1] == (
        facts["version"]
    )
