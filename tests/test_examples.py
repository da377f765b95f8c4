"""The examples run from the command line, quickly, and show what they promise."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """(what a short run prints, folder of the picture)"""
    folder = tmp_path_factory.mktemp("digits")
    command = [sys.executable, "examples/imbalanced_digits.py", "--epochs", "12", "--out", folder]
    env = {**os.environ, "COLUMNS": "120", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, folder


def test_curves_are_equal_up_to_rounding(digits):
    difference = re.search(r"largest difference between the curves: (\S+)", digits[0])
    assert float(difference[1]) < 2e-6


def test_curves_go_down(digits):
    rows = re.findall(r"│ +(\d+) │ (\d\.\d+) │ +(\d\.\d+) │", digits[0])
    assert [int(r[0]) for r in rows][-1] == 12
    assert float(rows[-1][2]) < 0.95 * float(rows[0][2])


def test_recall_of_every_class_and_the_time_in_the_loss(digits):
    rows = re.findall(r"│ +(\d) │ +(\d+) │ +(\S+)% │ +(\S+)% │", digits[0])
    assert [int(r[0]) for r in rows] == list(range(10))
    counts = [int(r[1]) for r in rows]
    assert counts == sorted(counts, reverse=True) and counts[0] > 10 * counts[-1]
    assert all(0 <= float(v) <= 100 for r in rows for v in r[2:])
    times = re.findall(r"│ +(.+?) │ +(\d+) ms │", digits[0])
    assert len(times) == 3 and all(int(ms) > 0 for _, ms in times)


def test_picture(digits):
    picture = digits[1] / "imbalanced_digits.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture) in digits[0].replace("\n", "")


def test_arguments_are_checked():
    command = [sys.executable, "examples/imbalanced_digits.py", "--epochs", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "at least 1" in done.stderr
