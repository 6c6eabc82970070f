# Everything runs in a virtual environment, .venv, which the first target makes. Another Python: make PYTHON=python3.12
PYTHON ?= python3
ARGS ?=

venv := .venv
bin := $(venv)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test soak check bench clean
.NOTPARALLEL:

help:  ## Show this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile

demo: $(venv)/.demo  ## Dump, break and restore the database of a small shop, on a server of its own
	@$(bin)/python examples/demo.py

test: $(venv)/.develop  ## Run the tests (ARGS="-k swap" for some of them)
	@$(bin)/python -m pytest -m "not soak" -n auto --maxprocesses 4 --dist loadfile $(ARGS)

soak: $(venv)/.develop  ## Run the long tests: faults injected over and over
	@$(bin)/python -m pytest -m soak $(ARGS)

check: $(venv)/.develop  ## Check format, style, types and imports
	$(bin)/ruff format --check
	$(bin)/ruff check
	$(bin)/mypy
	$(bin)/lint-imports

bench: $(venv)/.develop  ## Measure pgclone beside other tools (ARGS="--only dump"), and how long a swap keeps clients waiting
	@$(bin)/python benchmarks/compare.py $(ARGS)
	@$(bin)/python benchmarks/swap_gap.py

clean:  ## Remove the virtual environment, caches and what the demo left to look at
	rm -rf $(venv) .demo .bench .tox build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

$(venv)/.demo: packages := -e '.[psycopg2,server]'
$(venv)/.develop: packages := -e '.[test,check]' -e ./pgclone_s3 -e ./pgclone_gcs

# A venv that cannot run pip was interrupted on its way, or its Python is gone.
$(venv)/.demo $(venv)/.develop: pyproject.toml $(wildcard pgclone_*/pyproject.toml)
	@$(bin)/python -m pip --version > /dev/null 2>&1 || { $(supported) && $(PYTHON) -m venv --clear $(venv); }
	@echo "Installing $(packages) into $(venv)"
	@$(bin)/python -m pip install --disable-pip-version-check $(packages) > $(venv)/install.log 2>&1 \
		|| { cat $(venv)/install.log >&2; exit 1; }
	@touch $@

define supported
{ $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	|| { echo '$(PYTHON) is not Python 3.10 or newer. Choose another one: make PYTHON=python3.12' >&2; false; }; } \
&& { $(PYTHON) -c 'import ensurepip, venv' 2> /dev/null \
	|| { echo '$(PYTHON) cannot make virtual environments: install python3-venv (Debian, Ubuntu), or choose' \
		'another Python: make PYTHON=/path/to/python' >&2; false; }; }
endef
