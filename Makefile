# The two commands of the README, and what a developer runs besides.
PYTHON ?= python3
VENV ?= $(if $(filter python3,$(PYTHON)),.venv,.venv-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.PHONY: run test test-all lint audit bench clean

run: $(VENV)/run.stamp
	$(BIN)/python -m jaxcl.main --config=configs/quickstart.py --workdir=runs/quickstart

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile

# Also the tests that are marked slow, and all methods on all numbers of processes.
test-all: $(VENV)/test.stamp
	JAXCL_ALL_LAYOUTS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --slow

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/shellcheck tpu/*.sh tpu/slurm.sbatch
	@$(MAKE) --no-print-directory audit

# Asks an advisory service about every installed package; says so where none can be reached.
audit: $(VENV)/test.stamp
	@$(BIN)/python -m experiments.static.audit

# PEER=PYTHON, an interpreter that has torch and transformers, adds the comparison with them.
bench: $(VENV)/test.stamp
	$(BIN)/python -m experiments.benchmarks.overhead
	$(if $(PEER),$(BIN)/python -m experiments.benchmarks.train_step --peer_python=$(PEER))

clean:
	rm -rf .venv .venv-* build *.egg-info .pytest_cache .ruff_cache

$(VENV)/run.stamp: pyproject.toml
	@echo "Installing into $(VENV) (once; a minute or two) ..."
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	@touch $@

$(VENV)/test.stamp: $(VENV)/run.stamp
	@echo "Installing what the tests need into $(VENV) (once) ..."
	$(PIP) --editable '.[dev]'
	@touch $@
