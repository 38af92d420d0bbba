# Two targets for a newcomer: `make demo` and `make test`. Both set up `.venv` first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
UV     := $(shell command -v uv 2>/dev/null)

.PHONY: demo test check format lint types contracts bench soak screens setup clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
ifneq ($(UV),)
	$(UV) venv --quiet --allow-existing --python $(PYTHON) $(VENV)
	$(UV) pip install --quiet --python $(BIN)/python -e '.[dev]'
else
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
endif
	@$(BIN)/python -m compileall -q discovery agent tui demo_fleet.py
	@touch $@

demo: setup
	@$(BIN)/python demo_fleet.py

test: setup
	$(BIN)/python -m pytest -m 'not soak' -n 2 --dist loadfile

soak: setup
	$(BIN)/python -m pytest -m soak --timeout=3600

format: setup
	$(BIN)/ruff format .

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: setup
	$(BIN)/mypy

contracts: setup
	$(BIN)/lint-imports

check: lint types contracts test

bench: setup
	$(BIN)/python -m bench

screens: setup
	$(BIN)/python docs/screens.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
