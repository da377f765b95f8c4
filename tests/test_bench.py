"""The benchmark's own code, once, on a handful of rows and classes. No time is looked at."""

import csv
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks import bench, cases, rivals, timing, verify, worker
from benchmarks.ceilings import Machine
from benchmarks.report import (
    Findings,
    Setting,
    cliff_lines,
    losing_lines,
    publish,
    remark_lines,
    target_lines,
)

TINY = {c.name: c for c in cases.select(tiny=True) if not c.series}
# the largest that a shape of one million rows may become
assert all(c.elements < 10_000 for c in TINY.values())


def read_csv(folder: Path) -> list[dict]:
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# ---- a whole run --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Every kind of case through both allocators; (exit code, folder)."""
    folder = tmp_path_factory.mktemp("bench")
    arguments = ["--tiny", "--threads", "1", "--no-compile", "--out", str(folder)]
    return bench.main(arguments), folder


def test_every_case_gets_numbers(run):
    code, folder = run
    rows = read_csv(folder)
    lost = {r["case"]: r["status"] for r in rows if r["status"] != "ok"}
    assert not lost
    assert code == 0
    for case in cases.select(tiny=True):
        mine = [r for r in rows if r["case"] == case.name]
        found = {(r["malloc"], r["threads"], r["rival"], r["pass"]) for r in mine}
        for malloc in ("default", "keep"):
            for part in ("forward", "training"):
                for rival in ("ours", "eager"):
                    assert (malloc, "1", rival, part) in found, case.name
        assert all(float(r["median_us"]) > 0 for r in mine)
        assert all(math.isclose(float(r["ratio"]), 1) for r in mine if r["rival"] == "ours")
        assert all(math.isfinite(float(r["grad_error"])) for r in mine if r["rival"] == "ours")


def test_features_have_their_plain_call_beside_them(run):
    names = {r["case"] for r in read_csv(run[1]) if r["rival"] == "plain"}
    assert names == {c.name for c in TINY.values() if c.feature}


def test_ceilings_are_measured_beside_the_losses(run):
    rows = [r for r in read_csv(run[1]) if r["pass"] == "forward" and not r["series"]]
    assert rows and all(float(r["ceiling_share"]) > 0 for r in rows)
    facts = json.loads((run[1] / "environment.json").read_text())
    assert [(c["malloc"], c["threads"]) for c in facts["ceilings"]] == [("default", 1), ("keep", 1)]
    assert all(c["read_GBps"] > 0 and c["copy_GBps"] > 0 for c in facts["ceilings"])


def test_summary_and_pictures(run):
    text = (run[1] / "summary.md").read_text()
    assert all(f"| {name} |" in text for name in TINY)
    assert "## Targets" in text and "Cost of a feature" in text
    for name in ("ratios.png", "share.png", "scaling.png"):
        assert (run[1] / name).read_bytes().startswith(b"\x89PNG")


def test_threads(tmp_path):
    arguments = ["--tiny", "--threads", "1", "2", "--malloc", "default", "--no-compile"]
    assert bench.main([*arguments, "--cases", "6x10 f32 mix|rows", "--out", str(tmp_path)]) == 0
    found = {(r["threads"], bool(r["series"])) for r in read_csv(tmp_path)}
    assert found == {("1", False), ("2", False), ("2", True)}  # curves: the most threads only
    facts = json.loads((tmp_path / "environment.json").read_text())
    assert [c["threads"] for c in facts["ceilings"]] == [2, 1]


def test_torch_compile_is_a_rival(tmp_path):
    arguments = ["--tiny", "--threads", "1", "--malloc", "default", "--cases", "^4x8 f32$"]
    assert bench.main([*arguments, "--out", str(tmp_path)]) == 0
    passes = {r["pass"] for r in read_csv(tmp_path) if r["rival"] == "compile"}
    assert {"forward", "training"} <= passes


def test_a_case_that_kills_its_process_does_not_end_the_run(tmp_path, monkeypatch):
    script = tmp_path / "worker.py"
    script.write_text(f"""
import json, os, signal, sys
names = json.load(sys.stdin)["cases"]
say = lambda **fields: print({worker.MARK!r} + json.dumps(fields), flush=True)
for name in names:
    say(kind="begin", case=name)
    if name.startswith("6x10 f32"):
        os.kill(os.getpid(), signal.SIGSEGV)
    say(kind="end", case=name, status="ok", notes=[])
""")
    monkeypatch.setattr(bench, "WORKER", script)
    arguments = ["--tiny", "--threads", "1", "--malloc", "default", "--cases", "^(small|middle)$"]
    out = tmp_path / "out"
    assert bench.main([*arguments, "--out", str(out)]) == 1
    lost = {r["case"]: r["status"] for r in read_csv(out)}
    assert lost == {"6x10 f32": "failed: worker ended with signal 11"}
    assert "signal 11" in (out / "summary.md").read_text()


def test_a_worker_that_ends_between_cases_is_followed_by_another(tmp_path, monkeypatch):
    script = tmp_path / "worker.py"
    script.write_text(f"""
import json, sys
name = json.load(sys.stdin)["cases"][0]
for fields in (dict(kind="begin", case=name), dict(kind="end", case=name, status="ok", notes=[])):
    print({worker.MARK!r} + json.dumps(fields), flush=True)
sys.exit(1)
""")
    monkeypatch.setattr(bench, "WORKER", script)
    run = ["--tiny", "--threads", "1", "--malloc", "default", "--cases", "^small$"]
    assert bench.main([*run, "--out", str(tmp_path / "out")]) == 0


def test_a_worker_that_cannot_start_is_an_error(tmp_path, monkeypatch, capsys):
    script = tmp_path / "worker.py"
    message = worker.MARK + '{"kind": "unusable", "reason": "why"}'
    script.write_text(f"import sys; sys.stdin.read(); print({message!r})")
    monkeypatch.setattr(bench, "WORKER", script)
    assert bench.main(["--tiny", "--threads", "1", "--out", str(tmp_path / "out")]) == 2
    assert "cannot measure: why" in capsys.readouterr().out


# ---- no number without a right answer -----------------------------------------------------------


def exact(case, data):
    """Loss and gradient by float64 autograd over native operations, in the types of the case."""
    wide = {k: v.double() if v.is_floating_point() else v for k, v in data.extra.items()}
    target = data.target.double() if case.target == "soft" else data.target
    x = data.logits.detach().double().requires_grad_()
    double = cases.Data(x, target, data.weight.double(), data.grad.double(), wide)
    loss = rivals._native(replace(case, autocast=False), double)(x)
    (gradient,) = torch.autograd.grad(loss, x, double.grad if double.grad.dim() else None)
    return loss.detach().to(data.grad.dtype), gradient.to(data.logits.dtype)


@pytest.mark.parametrize("name", TINY)
def test_reference_agrees_with_float64_autograd(name):
    case = TINY[name]
    data = cases.make(case)
    loss, gradient = exact(case, data)
    assert verify.check(case, data, {"r": ([loss], gradient)})["r"].passed


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("what", ["loss", "gradient", "nan"])
def test_a_wrong_answer_is_found(name, what):
    case = TINY[name]
    data = cases.make(case)
    loss, gradient = exact(case, data)
    if what == "loss":
        loss = loss * (1 + 8 * torch.finfo(loss.dtype).eps) if case.dtype != "f64" else loss + 1e-9
    elif what == "gradient":
        largest = gradient.abs().argmax()
        index = torch.unravel_index(largest, gradient.shape)
        gradient[index] *= 1 + 4 * max(torch.finfo(gradient.dtype).eps, 1e-5)
    else:
        gradient[(0,) * gradient.dim()] = math.nan
    errors = verify.check(case, data, {"r": ([loss], gradient)})["r"]
    assert not errors.passed
    assert ("loss" if what == "loss" else "gradient") in errors.reason


def test_small_chunks_see_the_same(monkeypatch):
    monkeypatch.setattr(verify, "CHUNK", 50)
    for case in TINY.values():
        data = cases.make(case)
        loss, gradient = exact(case, data)
        assert verify.check(case, data, {"r": ([loss], gradient)})["r"].passed, case.name


def session(**changes) -> worker.Session:
    config = {"device": "cpu", "threads": [1], "isa": "native", "malloc": "default", "tiny": True,
              "compile": False, "ours": "wce", "deadline": math.inf, "verified": {}, **changes}
    return worker.Session(config)


def findings_of(case, monkeypatch, capsys, ours) -> list[dict]:
    """What a worker prints about a case when `ours` stands in for our loss."""
    def build(case, data, device, _):
        native = rivals._native(case, data)
        return {"ours": lambda x: ours(native(x)), "eager": native}, []

    monkeypatch.setattr(rivals, "build", build)
    mine = session()
    mine.measure_ceilings()
    capsys.readouterr()
    worker.run_case(mine, case, 1)
    lines = capsys.readouterr().out.splitlines()
    return [json.loads(x[len(worker.MARK):]) for x in lines if x.startswith(worker.MARK)]


def test_wrong_ours_gets_no_number(monkeypatch, capsys):
    case = TINY["6x10 f32"]
    said = findings_of(case, monkeypatch, capsys, lambda loss: loss * 1.001)
    assert [m["kind"] for m in said] == ["begin", "end"]
    assert said[-1]["status"].startswith("wrong answer")
    right = findings_of(case, monkeypatch, capsys, lambda loss: loss * 1.0)
    assert {"forward", "training"} <= {m["pass"] for m in right if m["kind"] == "row"}
    assert right[-1]["status"] == "ok"


def test_an_earlier_verdict_holds_for_the_same_bits_only(monkeypatch, capsys):
    case = TINY["6x10 f32"]
    said = findings_of(case, monkeypatch, capsys, lambda loss: loss * 1.0)
    (verdict,) = [m for m in said if m["kind"] == "verified"]
    earlier = {case.name: {**verdict, "errors": {"ours": [0.125, 0.25]}}}
    errors = {}
    for factor in (1.0, 1 + 2e-7):
        data = cases.make(case)
        native = rivals._native(case, data)
        table = {"ours": lambda x, f=factor, native=native: native(x) * f}
        errors[factor] = worker.verified(session(verified=earlier), case, data, table)[0]["ours"]
    assert (errors[1.0].loss_ulp, errors[1.0].gradient) == (0.125, 0.25)
    assert errors[1 + 2e-7].loss_ulp not in (0.0, 0.125)


def test_failing_ours_is_reported(monkeypatch, capsys):
    def fail(loss):
        raise RuntimeError("no such thing")

    said = findings_of(TINY["6x10 f32"], monkeypatch, capsys, fail)
    assert said[-1]["status"] == "failed: RuntimeError: no such thing"


# ---- parts --------------------------------------------------------------------------------------


def test_rivals_take_turns():
    class Clock:
        def sample(self, steps, inner):
            return [step() for step in steps]

    order = []
    rivals_by_name = {n: [lambda n=n: order.append(n) or 1.0] for n in "ab"}
    samples = timing.interleave(Clock(), rivals_by_name, timing.Effort(0.0, 60.0, 3, 9))
    assert order[-6:] == list("ababab")
    assert samples == {n: [[1.0]] * 3 for n in "ab"}


def test_a_slow_machine_gets_fewer_rounds():
    class Clock:
        def sample(self, steps, inner):
            return [1.0]

    samples = timing.interleave(Clock(), {"a": []}, timing.Effort(0.0, 0.0, 3, 9))
    assert len(samples["a"]) == 1


def test_cpu_clock_splits_single_calls_and_sums_repeated_ones():
    calls = []
    steps = [lambda: calls.append("f"), lambda: calls.append("b")]
    assert len(timing.CpuClock().sample(steps, 1)) == 2
    assert len(timing.CpuClock().sample(steps, 3)) == 1
    assert calls == ["f", "b"] * 4
    slow = [lambda: calls.append("s") or time.sleep(timing.SAMPLE_LIMIT / 10)]
    timing.CpuClock().sample(slow, 1000)
    assert calls.count("s") < 1000


def test_quantiles():
    assert timing.quantile([4, 1, 3, 2, 5], 0.25) == 2
    assert timing.median([1, 2]) == 1.5
    assert timing.quantile([7], 0.75) == 7


@pytest.mark.parametrize("helper", ["C", "torch"])
def test_ceiling_reads_and_copies_every_layout(helper):
    machine = Machine()
    if helper == "C" and machine.helper != "C":
        pytest.skip("no C compiler")
    if helper == "torch":
        machine._lib = None
    for case in TINY.values():
        x = cases.make(case).logits.detach()
        machine.read(x, 2)
        for streaming in (False, True):
            machine.copy(x, 2, streaming)
        start, size = machine._bytes(x)
        scratch = machine._scratch
        if helper == "C":  # whole cache lines, from the first aligned byte of the destination on
            offset = -scratch.data_ptr() % 64
            source = torch.as_strided(x, (size // x.element_size(),), (1,)).view(torch.uint8)
            lines = size // 64 * 64
            assert torch.equal(scratch[offset : offset + lines], source[:lines])


@pytest.mark.parametrize("isa", ["native", "avx2", "base"])
def test_exp_rate(isa):
    machine = Machine(isa)
    if machine.helper != "C":
        pytest.skip("no C compiler that knows these flags")
    if isa == "avx2" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("no AVX2 here")
    assert machine.exp_rate(1) > 0


def test_values_and_layouts():
    ascending = cases.make(cases.Case("long", (3, 9), values="ascending")).logits
    assert bool((ascending.diff(dim=1) > 0).all())
    shifted = cases.make(cases.Case("long", (2, 5, 7), layout="shifted")).logits
    assert shifted.shape == (2, 7, 5)[:1] + (5, 7)
    assert shifted.stride() == (8 * 5, 1, 5)
    last = cases.make(cases.Case("planes", (2, 3, 4, 4, 4), layout="channels_last")).logits
    assert last.is_contiguous(memory_format=torch.channels_last_3d)
    same = cases.make(TINY["6x10 f32"]), cases.make(TINY["6x10 f32"])
    assert torch.equal(same[0].logits, same[1].logits)


def test_full_and_quick_lists():
    full, quick = cases.select(), cases.select(quick=True)
    assert {c.group for c in full} == set(cases.GROUPS)
    assert all(c.nbytes <= 512 << 20 for c in full)
    assert max(c.elements for c in quick) < max(c.elements for c in full)
    cuda = {c.shape for c in cases.select("cuda")}
    assert (4_000_000, 19) in cuda and (4, 8) in cuda


def row(case, ratio, rival="eager", group="long", malloc="default", ns=1.0, series=""):
    shape = case.split()[0]
    elements = math.prod(int(d) for d in shape.split("x"))
    return {"case": case, "shape": shape, "group": group, "series": series, "malloc": malloc,
            "threads": 2, "rival": rival, "pass": "training", "ratio": ratio,
            "ns_per_element": ns, "median_us": ns * elements / 1e3}


def test_targets_name_the_worst_case():
    found = Findings()
    for case, ratio in (("8x1000 a", 5.0), ("8x1000 b", 13.0)):
        found.add(row(case, ratio))
        found.add(row(case, 4.0, malloc="keep"))
    found.add(row("8x1000 a", 2.0, rival="compile", malloc="keep"))
    lines = {(line[0], line[1]): line for line in target_lines(found)}
    assert lines["C >= 1000", "eager"][4] == "5.00, 8x1000 a"
    assert lines["C >= 1000", "eager"][6:] == ["1 of 2", "1 of 2"]
    assert lines["C >= 1000", "better of both, memory kept"][4:6] == ["2.00, 8x1000 a", "2.00"]
    assert found.settings() == [Setting("default", 2), Setting("keep", 2)]


def test_losses_and_cliffs_are_listed():
    found = Findings()
    found.add(row("8x1000 a", 0.9))
    assert "eager takes 0.90 of our time" in losing_lines(found)[0]
    for n, ns in ((100_000, 1.0), (1_000_000, 1.5), (10_000_000, 3.5)):
        found.add(row(f"{n}x10 [rows]", 1.0, "ours", "scaling", ns=ns, series="rows"))
    assert len(losing_lines(found)) == 1
    (cliff,) = cliff_lines(found)
    assert "1000000x10 to 10000000x10" in cliff


def test_remarks_of_the_same_kind_are_one_line():
    found = Findings()
    found.status = [("a", "keep", "ok", []), ("b", "keep", "skipped", []),
                    ("c", "keep", "skipped", []), ("d", "keep", "ok", ["eager does not run"])]
    assert remark_lines(found) == ["skipped (keep malloc): b, c",
                                   "eager does not run (keep malloc): d"]


def test_publishing_keeps_the_remarks(tmp_path):
    picture = tmp_path / "ratios.png"
    picture.write_bytes(b"picture")
    docs = tmp_path / "docs"
    page = publish("speed", docs, "# first\n", [picture])
    page.write_text(page.read_text() + "\n## Remarks\n\nby hand\n")
    publish("speed", docs, "# second\n", [picture])
    text = page.read_text()
    assert "second" in text and "first" not in text and text.endswith("## Remarks\n\nby hand\n")
    assert text.count("images/speed-ratios.png") == 1
    assert (docs / "images" / "speed-ratios.png").read_bytes() == b"picture"


def test_device_without_gpu_is_skipped_with_a_reason(capsys, tmp_path):
    if not bench.no_gpu():
        pytest.skip("there is a GPU")
    assert bench.main(["--device", "cuda", "--out", str(tmp_path)]) == 0
    assert f"skipped: {bench.no_gpu()}" in capsys.readouterr().out


def test_command_line(capsys, tmp_path):
    assert bench.main(["--list", "--cases", "soft"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed and all("soft" in line for line in listed)
    assert bench.main(["--cases", "no such case", "--out", str(tmp_path)]) == 2
    for wrong in (["--cases", "("], ["--threads", "0"]):
        with pytest.raises(SystemExit):
            bench.parse(wrong)
    args = bench.parse(["--quick", "--isa", "avx2", "--threads", "1", "2"])
    assert args.threads == [2, 1] and args.minutes < 2
    env = bench.worker_environment(args, "keep")
    assert (env["WCE_CPU_ISA"], env["ATEN_CPU_CAPABILITY"]) == ("avx2", "avx2")
    assert int(env["MALLOC_MMAP_THRESHOLD_"]) > 2**34
    assert not set(bench.KEEP) & set(bench.worker_environment(args, "default"))


def test_native_in_our_place():
    case = TINY["6x10 f32 mixup"]
    data = cases.make(case)
    table, notes = rivals.build(case, data, "cpu", "native")
    assert set(table) == {"ours", "eager"} and notes == []
    assert torch.equal(table["ours"](data.logits), table["eager"](data.logits))


def test_the_graph_that_eager_builds_for_smoothing_is_native():
    case = replace(TINY["6x10 f32"], smoothing=0.1)
    data = cases.make(case)
    got = rivals._native(case, data)(data.logits)
    want = F.cross_entropy(data.logits, data.target, data.weight, label_smoothing=0.1)
    assert torch.equal(got, want)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q"]))
