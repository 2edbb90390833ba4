# Everything runs in .venv, made on first use from requirements.lock.
#   make sweep BUDGET=16384                       the main job; SWEEP=cifar10 PROFILE=slurm ARGS='seeds=5' vary it
#   make probe SWEEP=quickstart DOWNSTREAM=~/pets add a labelled folder to a finished sweep
#   make slurm-up | slurm-status | slurm-down     a SLURM cluster on this machine (root), for PROFILE=slurm-dev
#   make test | make test-slow | make lint        the checks that CI runs
#   make bench | make bench DEVICE=cuda           the table of ratios, kept in docs/benchmarks.md; ARGS='--only step'

PYTHON ?= $(shell command -v python3.11 || command -v python3)
SWEEP ?= quickstart
PROFILE ?= local
BUDGET ?=
DOWNSTREAM ?=
DEVICE ?= cpu
ARGS ?=

BIN := .venv/bin
READY := .venv/.ready
RUN := $(BIN)/ssl-diversity
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: setup sweep plan probe status report slurm-up slurm-down slurm-status test test-slow lint bench bench-data clean

setup: $(READY)

$(READY): requirements.lock pyproject.toml ssl_diversity/torchvision_cpu.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
	  || { echo "error: Python 3.11 is needed, $(PYTHON) is another; pass PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	$(BIN)/python -m ssl_diversity.torchvision_cpu
	@touch $@

sweep: $(READY)
	@$(RUN) sweep $(SWEEP) --profile $(PROFILE) $(if $(BUDGET),budget=$(BUDGET)) $(ARGS)

plan: $(READY)
	@$(RUN) plan $(SWEEP) --profile $(PROFILE) $(if $(BUDGET),budget=$(BUDGET)) $(ARGS)

probe: $(READY)
	@test -n "$(DOWNSTREAM)" || { echo "error: say what to probe on, for example DOWNSTREAM=~/flowers.tar" >&2; exit 2; }
	@$(RUN) probe --sweep $(SWEEP) --downstream "$(DOWNSTREAM)" --profile $(PROFILE) $(ARGS)

status: $(READY)
	@$(RUN) status $(SWEEP) $(ARGS)

report: $(READY)
	@$(RUN) report $(SWEEP) $(ARGS)

slurm-up slurm-down slurm-status:
	@launch/slurm_dev.sh $(@:slurm-%=%)

test: $(READY)
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python tests/benchmarks/run_all.py --device $(DEVICE) $(ARGS)

bench-data: $(READY)
	$(BIN)/python tests/benchmarks/bench_views.py
	$(BIN)/python tests/benchmarks/bench_index.py --rows 1e8
	$(BIN)/python tests/benchmarks/bench_prepare.py --images 2000000 --memory-gb 2 --kill

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache build *.egg-info
