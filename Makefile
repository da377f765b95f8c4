# make demo          train a small network with torch's loss and with ours, side by side
# make test          build and run the whole suite        ARGS="-k name" goes to pytest, JOBS=2
# make test-slow     tests that take minutes or tens of GiB
# make test-clients  Hugging Face, Lightning and MONAI with our loss
# make bench         verify, then time                    QUICK=1, DEVICE=cuda, ARGS=...
# make fuzz          the C kernels under sanitizers       SECONDS=60, SEED=1
# make lint          check the Python files
# make clean         remove what a build made; distclean: the virtual environment too
#
# The first call makes .venv and builds; later ones do only what has changed.

PYTHON ?= python3
ARGS ?=
JOBS ?= 2
SECONDS ?= 60
SEED ?= 1

VENV := .venv
PY := $(VENV)/bin/python
RUN := PYTHONPATH=$(CURDIR) $(PY)
PIP := $(PY) -m pip --disable-pip-version-check install --quiet

.PHONY: build demo test test-slow test-clients bench fuzz lint clean distclean

# setup.py compiles only what has changed, and knows better than make what that is.
build: $(VENV)/ready
	@$(PY) setup.py --quiet build_ext --inplace

$(VENV)/ready: requirements-dev.txt
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON). What to do: install Python \
	3.11 or newer with pip and venv, or name one: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("The pinned packages \
	need Python 3.11 or newer. What to do: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements-dev.txt
	@touch $@

$(VENV)/ready-clients: $(VENV)/ready requirements-clients.txt
	$(PIP) -r requirements-clients.txt
	@touch $@

demo: build
	$(RUN) examples/imbalanced_digits.py $(ARGS)

test: build
	$(RUN) -m pytest -q -n $(JOBS) --dist loadfile $(ARGS)

test-slow: build
	$(RUN) -m pytest -q -m slow $(ARGS)

test-clients: build $(VENV)/ready-clients
	$(RUN) -m pytest -q -m clients $(ARGS)

bench: build
	$(RUN) benchmarks/bench.py $(if $(QUICK),--quick) $(if $(DEVICE),--device $(DEVICE)) $(ARGS)

fuzz: $(VENV)/ready
	$(PY) tests/c_driver/build.py --seconds $(SECONDS) --seed $(SEED) $(ARGS)

lint: $(VENV)/ready
	$(PIP) ruff==0.17.6
	$(VENV)/bin/ruff check .

clean:
	rm -rf build dist out *.egg-info wce_torch/*.so .pytest_cache .hypothesis .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
