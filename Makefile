# Every target installs what it needs into .venv once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# A second environment, with the newest Flower that pyproject.toml allows.
NEWEST := .venv-newest-flower
# What stands on Flower's insides: its messages, its grid, its log lines, its processes.
ON_FLOWER := tests/clients/test_app.py tests/deploy tests/strategies/test_nodes.py tests/strategies/test_packing.py \
	tests/e2e/test_deployment.py

# Flower and its helpers: no word to outside, no installation in the middle of a run.
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION := 1
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: demo install lint format test test-slow newest-flower clean

demo: install
	$(BIN)/fomoe train model=tiny federation.num_sites=4 strategy.overlap=2

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: install
	$(BIN)/python -m pytest -n 2

test-slow: install
	$(BIN)/python -m pytest -m slow

newest-flower:
	test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	grep -v '^flwr' constraints.txt > $(NEWEST)/constraints.txt
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(NEWEST)/constraints.txt -e . \
		pytest hypothesis
	$(NEWEST)/bin/python -m pytest $(ON_FLOWER)

clean:
	rm -rf $(VENV) $(NEWEST) .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
