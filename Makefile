# Every target does the set-up it needs, on Debian/Ubuntu with Python >= 3.11 and PyPI.
#
#   make demo      prune, export and measure the two embedded networks
#   make test      run the tests
#   make check     lint, format, types
#   make wheel     build the wheel twice, hold the two against each other, leave one in dist/
#   make hashes    hold what was downloaded against .ci/hashes.txt
#   make audit     ask for known vulnerabilities of what is installed; only warns
#   make fuzz      spoil files of every kind and see who fails (FUZZ='--cases 100000')
#   make bench     run the benchmarks in their short form
#   make install   only the set-up: .venv with everything in it
#   make clean     remove caches and demo bundles (not .venv)
#
# Options: PYTHON=python3.12       the interpreter for .venv
#          TORCH_INDEX=URL         one more package index, for example PyTorch's own with CPU builds
#          EXTRAS=gpu,test,dev     other extras than the default (cpu and gpu exclude each other)
#          PIP_OPTIONS=...         anything else for `pip install`
#          PYTEST_OPTIONS=...      anything else for `pytest`

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS ?= cpu,trt-rtx,lite,test,dev
TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)
CANDIDATES := $(if $(PYTHON),$(PYTHON),python3 python3.13 python3.12 python3.11)
REPORT = --report $(VENV)/downloaded-$$(date +%s)
BENCHMARKS = $(sort $(wildcard benchmarks/bench_*.py))

export ORT_DISABLE_TELEMETRY = 1

.PHONY: demo test check wheel hashes audit fuzz bench install clean
.DEFAULT_GOAL := demo
.DELETE_ON_ERROR:

demo: $(STAMP)
	$(BIN)/cswap-deploy build demo-resnet --ratio 0.4 -o demo-bundles/demo-resnet
	$(BIN)/cswap-deploy build demo-vit --ratio 0.4 -o demo-bundles/demo-vit
	@echo
	@echo "The reports are here:"
	@for model in demo-resnet demo-vit; do \
		echo "  $(CURDIR)/demo-bundles/$$model/report.html"; done

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal \
		$(PYTEST_OPTIONS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: $(STAMP)
	.ci/wheel $(BIN)/python

hashes: $(STAMP)
	$(BIN)/python .ci/hashes.py $(HASHES) $(VENV)/downloaded-*.json

# It asks the package index; without one, or where it takes long, everything else goes on.
audit: $(STAMP)
	@timeout -k 5 60 $(BIN)/pip-audit --local --skip-editable --progress-spinner off || \
		echo "warning: pip-audit found what is above, or could not ask in 60 s" >&2

fuzz: $(STAMP)
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m fuzz $(FUZZ)

bench: $(STAMP)
	@if [ -z "$(BENCHMARKS)" ]; then echo "benchmarks/ holds no bench_*.py yet"; fi
	@set -e; for file in $(BENCHMARKS); do \
		echo "$$file --quick"; $(BIN)/python "$$file" --quick; done

install: $(STAMP)

# The stamp is written last: after an interruption the next run starts the set-up again.
# torch stands in the same command as what needs it, or pip may fetch two builds of it.
$(STAMP): pyproject.toml constraints.txt tests/runtime/headers.txt
	@python=; for one in $(CANDIDATES); do \
		if $$one -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
			python=$$one; break; fi; done; \
	if [ -z "$$python" ]; then \
		echo "no Python >= 3.11 among: $(CANDIDATES)" >&2; \
		echo "  fix: apt-get install python3 python3-venv, or make PYTHON=/path/to/python" >&2; \
		exit 1; fi; \
	if ! $$python -c 'import ensurepip, venv' >/dev/null 2>&1; then \
		echo "$$python cannot make virtual environments: venv or ensurepip is missing" >&2; \
		echo "  fix: apt-get install python3-venv" >&2; \
		exit 1; fi; \
	echo "$$python -m venv $(VENV)"; $$python -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_OPTIONS) $(REPORT)-1.json \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
		-c constraints.txt torch==$(TORCH_VERSION) -e ".[$(EXTRAS)]"
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_OPTIONS) $(REPORT)-2.json --no-deps \
		-r tests/runtime/headers.txt
	@touch $@

clean:
	rm -rf .mypy_cache .ruff_cache .pytest_cache build dist demo-bundles
	find cswap_deploy tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
