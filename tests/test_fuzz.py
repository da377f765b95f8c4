"""The C kernels under AddressSanitizer and UndefinedBehaviorSanitizer (tests/c_driver)."""

import subprocess

import pytest
from c_driver import build as c_driver


@pytest.fixture(scope="module")
def program(request):
    if not c_driver.has_sanitizers():
        pytest.skip(f"{c_driver.find_compiler()[0]} has no AddressSanitizer or UBSan")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(c_driver.ROOT)
        return c_driver.ROOT / c_driver.build()


def run(program, *arguments):
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_no_access_outside_and_right_values(program):
    """Every instruction set of this processor; a failure's text names the seed that repeats it."""
    status, text = run(program, "--seconds", 20, "--seed", 1)
    assert status == 0, text
    assert "no error" in text and " base" in text


@pytest.mark.parametrize(
    "plant, complaint",
    [("read", "AddressSanitizer"), ("write", "AddressSanitizer"), ("value", "WRONG")],
)
def test_planted_error_is_found(program, plant, complaint):
    status, text = run(program, "--cases", 100, "--plant", plant)
    assert status != 0 and complaint in text
    assert "--seed" in text, "the report does not say how to repeat the case"
