"""examples/weights_or_priors.py: its measures by hand, its exact claims, and one quick run."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
SPEC = importlib.util.spec_from_file_location(
    "weights_or_priors", ROOT / "examples" / "weights_or_priors.py"
)
script = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(script)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("weights-or-priors")
    doc = out / "doc.md"
    shutil.copy(ROOT / "docs" / "weights-and-priors.md", doc)
    return out, doc, script.main(["--quick", "--out", str(out), "--doc", str(doc)])


def test_wrong_formula_moves_with_a_constant():
    rows = script.added_constant()
    assert len(rows) == 9
    for row in rows:
        wrong = row["formula"].startswith("-weight")
        slope = 1 - row["weight of target"] if wrong else 0
        assert row["loss, 10 added"] - row["loss"] == pytest.approx(10 * slope, abs=1e-12)
        assert row["sum of gradient"] == pytest.approx(slope, abs=1e-12)


def test_minima_are_where_the_formulas_say():
    found = script.best_probabilities()
    for name in ("plain", "weights", "prior, left out"):
        assert found[name]["found"] == pytest.approx(found[name]["expected"], abs=1e-6)


def test_prior_kept_is_plain_in_a_convex_model():
    case = script.convex(script.cancer, 10)
    assert case["plain against prior kept"] < 1e-6
    assert case["bias of plain minus bias of prior minus log q"] < 1e-6
    assert case["plain against prior left out"] > 0.1


def test_log_q_may_leave_the_numerator_only(quick):
    found = quick[2]["numerator only"]
    assert found["loss minus (loss without log q_y) plus log q_y"] < 1e-12
    assert found["gradient minus gradient without log q_y"] < 1e-12
    assert found["gradient minus gradient of plain"] > 0.01


def test_split_is_what_it_says():
    x, y = script.digits()
    task = script.make_task(x, y, 20, seed=3)
    counts = torch.bincount(task.y)
    assert torch.equal(counts.float(), task.counts)
    assert counts[0] == 87 and counts[-1] == 4
    assert (counts.diff() < 0).all()
    # Every class keeps half of its samples for testing, and no sample is on both sides.
    assert sorted(torch.bincount(task.test_y).tolist()) == sorted(
        (torch.bincount(y) // 2).tolist()
    )
    rows = {tuple(row) for row in task.x.tolist()}
    overlap = sum(tuple(row) in rows for row in task.test_x.tolist())
    assert overlap <= 2  # images that are equal after shrinking
    torch.testing.assert_close(task.q.sum(), torch.tensor(1.0))
    assert (task.w[task.y]).mean().item() == pytest.approx(1, abs=1e-5)


def test_calibration_error_by_hand():
    stated = torch.tensor([0.95, 0.95, 0.95, 0.95, 0.55, 0.55])
    hit = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 0.0])
    weight = torch.full((6,), 1 / 6)
    expected = 4 / 6 * abs(0.75 - 0.95) + 2 / 6 * abs(0.5 - 0.55)
    assert script.calibration_error(stated, hit, weight) == pytest.approx(expected, abs=1e-6)
    weight = torch.tensor([1.0, 0, 0, 0, 1.0, 1.0]) / 3
    expected = 1 / 3 * 0.05 + 2 / 3 * 0.05
    assert script.calibration_error(stated, hit, weight) == pytest.approx(expected, abs=1e-6)


def test_test_set_weights():
    task = script.make_task(*script.cancer(), 10, seed=0)
    p = script.predictions(torch.full((len(task.test_y), 2), 0.5), task)
    for weight, share in ((p.as_trained, task.q), (p.balanced, torch.tensor([0.5, 0.5]))):
        found = torch.zeros(2).index_add(0, p.y, weight)
        torch.testing.assert_close(found, share)


def test_quick_run_writes_everything(quick):
    out, doc, results = quick
    assert set(results["scores"]) == {"digits", "breast cancer"}
    for readings in results["scores"].values():
        assert set(script.READINGS) < set(readings)
        for seeds in readings.values():
            assert len(seeds) == 2
            for s in seeds:
                assert 0 <= s["accuracy"] <= 1 and 0 <= s["balanced accuracy"] <= 1
                assert s["NLL, as trained"] > 0
    assert json.loads((out / "weights-or-priors.json").read_text())["seeds"] == 2
    names = re.findall(r"\(images/(.*?\.png)\)", doc.read_text())
    assert len(names) == 5
    for name in names:
        assert (doc.parent / "images" / name).read_bytes()[:4] == b"\x89PNG"
        assert (ROOT / "docs" / "images" / name).exists()


def test_document_takes_the_tables_and_nothing_else(quick):
    out, doc, _ = quick
    before, after = (ROOT / "docs" / "weights-and-priors.md").read_text(), doc.read_text()
    block = re.compile(r"(<!-- table: .*? -->\n).*?(<!-- end -->)", re.S)
    assert block.sub(r"\1\2", before) == block.sub(r"\1\2", after)
    assert before != after
    tables = (out / "weights-or-priors.md").read_text()
    for body in re.findall(r"<!-- table: .*? -->\n(.*?)<!-- end -->", after, re.S):
        assert body.strip() and body in tables
    with pytest.raises(SystemExit, match="0 places"):
        script.update_document(doc, {"no such table": ""})
