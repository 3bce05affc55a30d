# Needs Python 3.11 or later with venv, and make; a C compiler is used where there is one.
# PYTHON=python3.12 make test uses another interpreter.

PYTHON ?= python3
VENV := .venv
VENV_DEMO := .venv-demo
VENV_DOCS := .venv-docs
PIP_OPTIONS := --quiet --disable-pip-version-check

# A change in one of these makes an installed package out of date; Python modules are used where they lie.
INSTALL_INPUTS := pyproject.toml setup.py src/weightlift/_version.py src/weightlift/engines/_engine.c src/weightlift/formats/_values.c

.PHONY: help demo test bench docs fuzz coverage mutation sanitize sanitize-sample fetch-hip clean
.PHONY: check check-format check-lint check-lengths check-import check-layers check-engine check-types
.NOTPARALLEL:

help:
	@echo "make demo      loads a real checkpoint by every path and prints one table (numpy, no torch)"
	@echo "make test      runs the tests; ARGUMENTS=... goes to pytest"
	@echo "make check     runs every gate: format, lint, types, layers, lengths, import time, the C engine"
	@echo "make bench     runs the benchmarks; ARGUMENTS=... goes to them"
	@echo "make docs      builds the documentation into build/docs, warnings as errors"
	@echo "make fuzz      tries hostile files by the million, guided by what they reach; ARGUMENTS=... goes to tests/fuzz/run.py"
	@echo "make coverage  runs the tests and records which branches they reach (some 25 minutes)"
	@echo "make mutation  breaks the code in many places and records which of them the tests notice (hours);"
	@echo "               ARGUMENTS=\"plan buffers\" looks at some modules"
	@echo "make sanitize  repeats the tests of the C engine under address, undefined and thread sanitizers"
	@echo "               (make sanitize-sample: only the quickest of them, as .ci/run does)"
	@echo "make fetch-hip fetches the real HIP runtime, which some tests compare with; needs apt, no GPU"
	@echo "make clean     removes environments, builds and caches"

demo: $(VENV_DEMO)/installed
	$(VENV_DEMO)/bin/python benchmarks/demo.py $(ARGUMENTS)

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest $(ARGUMENTS)

# One target per gate: make -k check goes on after the first that fails.
check: check-format check-lint check-lengths check-import check-layers check-engine check-types

check-format: $(VENV)/installed
	$(VENV)/bin/ruff format --check
check-lint: $(VENV)/installed
	$(VENV)/bin/ruff check
check-lengths: $(VENV)/installed
	$(VENV)/bin/python tools/check_lengths.py
check-import: $(VENV)/installed
	$(VENV)/bin/python tools/check_import.py
check-layers: $(VENV)/installed
	$(VENV)/bin/lint-imports
check-engine: $(VENV)/installed
	$(VENV)/bin/python tools/check_engine.py warnings build
check-types: $(VENV)/installed
	$(VENV)/bin/mypy

bench: $(VENV)/installed
	$(VENV)/bin/python benchmarks/cpu.py $(ARGUMENTS)

# The doctrees lie beside the pages, so that what is published holds nothing but pages.
docs: $(VENV_DOCS)/installed
	$(VENV_DOCS)/bin/python tools/reference_docs.py --check
	$(VENV_DOCS)/bin/python benchmarks/page.py --check
	$(VENV_DOCS)/bin/python -m sphinx --quiet --fail-on-warning --keep-going -d build/doctrees docs build/docs
	@echo "the documentation is in build/docs/index.html"

fuzz: $(VENV)/fuzz
	$(VENV)/bin/python tests/fuzz/run.py $(ARGUMENTS)

coverage: $(VENV)/measuring
	$(VENV)/bin/python tools/measure_coverage.py $(ARGUMENTS)
mutation: $(VENV)/measuring
	$(VENV)/bin/python tools/measure_mutation.py $(ARGUMENTS)

sanitize: $(VENV)/installed
	$(VENV)/bin/python tools/check_engine.py run --require
sanitize-sample: $(VENV)/installed
	$(VENV)/bin/python tools/check_engine.py sample

fetch-hip: $(VENV)/installed
	$(VENV)/bin/python tools/fetch_hip.py

clean:
	rm -rf .cache $(VENV) $(VENV_DEMO) $(VENV_DOCS) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	rm -rf src/weightlift.egg-info src/weightlift/engines/libweightlift_engine.so
	find src tests tools benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment itself depends on nothing that changes; pip is renewed for its --group option.
$(VENV)/created $(VENV_DEMO)/created $(VENV_DOCS)/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is older than Python 3.11; name another one: make PYTHON=python3.11" >&2; exit 1; }
	@echo "creating $(@D)"
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install $(PIP_OPTIONS) --upgrade "pip>=25.1"
	@touch $@

$(VENV)/installed: $(VENV)/created $(INSTALL_INPUTS)
	@echo "installing weightlift and what its tests and checks need into $(VENV)"
	@$(VENV)/bin/python -m pip install $(PIP_OPTIONS) --editable . --group test --group check
	@$(VENV)/bin/python -m pip install $(PIP_OPTIONS) --no-deps --group frameworks-alone
	@touch $@

$(VENV)/fuzz: $(VENV)/installed
	@echo "installing the fuzzer into $(VENV)"
	@$(VENV)/bin/python -m pip install $(PIP_OPTIONS) --group fuzz
	@touch $@

$(VENV)/measuring: $(VENV)/installed
	@$(VENV)/bin/python -m pip install $(PIP_OPTIONS) --group measure
	@touch $@

$(VENV_DEMO)/installed: $(VENV_DEMO)/created $(INSTALL_INPUTS)
	@echo "installing weightlift and what its demo needs into $(VENV_DEMO)"
	@$(VENV_DEMO)/bin/python -m pip install $(PIP_OPTIONS) --editable ".[numpy]" --group demo
	@touch $@

$(VENV_DOCS)/installed: $(VENV_DOCS)/created $(INSTALL_INPUTS)
	@echo "installing weightlift and what its documentation needs into $(VENV_DOCS)"
	@$(VENV_DOCS)/bin/python -m pip install $(PIP_OPTIONS) --editable . --group docs
	@touch $@
