# Two commands for a newcomer: `make demo` and `make test`. Each sets up its own .venv; `make help` lists the others.
# Without a GPU, TORCH_INDEX=https://download.pytorch.org/whl/cpu saves several GB of CUDA packages.

PYTHON ?= python3
TORCH_INDEX ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt

.PHONY: help demo test test-kernel lint format docs install clean bench report readme

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*  ## /\1\t/p' Makefile | expand -t 13

demo: .venv/demo.done  ## train on real digits, sample, and measure the samples
	$(BIN)/python train.py --config configs/digits.yaml
	$(BIN)/uvit-fast demo

test: .venv/test.done  ## the whole CPU suite
	$(BIN)/python -m pytest -m "not gpu"
	$(BIN)/python -m pytest benchmarks --benchmark-only -k "not contract" -q  # those ran with the tests

test-kernel: .venv/test.done  ## one op: interpreter, contracts and, on a GPU, its tests there: OP=ln_mlp
	@$(BIN)/python -m tests.kernels $(OP)

lint: .venv/test.done  ## ruff and mypy, as CI runs them
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

format: .venv/test.done  ## ruff's repairs and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/test.done  ## measure benchmarks/results anew, report too; BENCH=--quick: seven minutes on an H100
	$(BIN)/uvit-fast bench $(BENCH)

report: .venv/test.done  ## tables and plots anew from benchmarks/results/*.csv
	$(BIN)/python -m benchmarks.plot
	$(BIN)/python -m benchmarks.report

readme: .venv/test.done  ## the tables of README, docs/benchmarks.md and fp8.md anew from benchmarks/results/*.csv
	$(BIN)/python -m benchmarks.table

docs: .venv/docs.done  ## the documentation as a site, site/index.html; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

install: .venv/demo.done  ## the package alone, editable, into .venv

.venv/torch.done: constraints.txt tools/make_venv.sh
	sh tools/make_venv.sh $(PYTHON) .venv
	$(PIP) setuptools wheel ninja
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch numpy
	touch $@

# DeepSpeed comes as source: its build needs the torch that is already there, and builds none of its CUDA ops.
.venv/demo.done: .venv/torch.done setup.py
	DS_BUILD_OPS=0 $(PIP) --no-build-isolation deepspeed
	$(PIP) --no-build-isolation -e ".[digits]"
	touch $@

.venv/test.done: .venv/demo.done
	$(PIP) --no-build-isolation -e ".[digits,test]"
	touch $@

# The site reads the sources and imports nothing of them: no torch is needed.
.venv/docs.done: constraints.txt tools/make_venv.sh
	sh tools/make_venv.sh $(PYTHON) .venv
	$(PIP) mkdocs-material "mkdocstrings[python]" ruff
	touch $@

clean:  ## remove .venv and whatever was built
	rm -rf .venv build site *.egg-info .pytest_cache .ruff_cache
