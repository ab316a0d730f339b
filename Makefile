# Both commands set up all that they need in .venv; Python 3.11 or newer, make and a compiler suffice.
PYTHON ?= python3
VENV ?= .venv
CORES ?= 2
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
KERNELS := $(VENV)/.kernels
BRAINMARKS := .venv-brainmarks
# Extras of pyproject.toml, in brackets, that `make install` adds to the package.
EXTRAS = [ants]

.PHONY: help demo demo-all test test-fast test-kernels test-brainmarks gpu lint format clean install kernels
.DELETE_ON_ERROR:

help: ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

demo: data/demo/participants.tsv ## synthetic subjects through the whole workflow, to a report
	$(BIN)/snakemake --cores $(CORES) all --configfile config/demo.yaml --set-threads finetune_model=1
	@$(BIN)/neuromamba summary --config config/config.yaml config/demo.yaml

demo-all: data/demo/participants.tsv ## the same with all four model families in one report
	$(BIN)/snakemake --cores $(CORES) all --configfile config/demo.yaml config/demo-all.yaml --set-threads pretrain_model=1 finetune_model=1
	@$(BIN)/neuromamba summary --config config/config.yaml config/demo.yaml config/demo-all.yaml

# The folder is renamed into place whole, so one file tells that all of it is there.
data/demo/participants.tsv: | $(INSTALLED)
	$(BIN)/neuromamba demo-data data/demo

test: lint ## all tests, the linters and the type checker
	@# Files in the order of tests/conftest.py, the longest first.
	$(BIN)/pytest --numprocesses $(CORES) --dist loadfile --no-loadscope-reorder

test-fast: $(INSTALLED) ## the tests that take seconds
	$(BIN)/pytest -m "not slow"

test-kernels: $(KERNELS) ## mamba-ssm's kernels against ours, by Triton's interpreter where there is no GPU
	$(BIN)/pytest tests/test_kernels.py

test-brainmarks: $(BRAINMARKS)/.installed ## our models in Brainmarks' own code, in an environment of its own
	$(BRAINMARKS)/bin/pytest tests/test_brainmarks.py

gpu: $(KERNELS) ## on a machine with an NVIDIA GPU: its tests, and its benchmarks into benchmarks/results
	$(BIN)/pytest -m cuda
	$(BIN)/python benchmarks/ssd.py --device cuda
	$(BIN)/python benchmarks/step.py --device cuda --sizes small base --packed 1 4 16 --kernels torch compile mamba-ssm
	$(BIN)/python benchmarks/window_length.py --device cuda --precision bfloat16 --volumes 20 50 100 200 256 --repeats 10 --checkpoint

lint: $(INSTALLED) ## style, types, import layers and workflow format
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/snakefmt --check Snakefile workflow
	$(BIN)/snakemake --lint
	$(BIN)/mypy
	$(BIN)/lint-imports
	@# The hooks are the same checks; this shows that they work. They need a git checkout.
	if [ -e .git ]; then PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pre-commit run --all-files; fi

format: $(INSTALLED) ## rewrite the files in the project's style
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/snakefmt Snakefile workflow

clean: ## remove the demo's data and all results, not the environment
	rm -rf data/demo results .snakemake logs

$(INSTALLED): pyproject.toml envs/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(MAKE) install PYTHON=$(BIN)/python EXTRAS='[ants,workflow,dev]'
	@touch $@

# Brainmarks asks for setuptools < 67 and torch for a newer one, so pip cannot install both as they are.
$(BRAINMARKS)/.installed: pyproject.toml envs/constraints.txt
	$(PYTHON) -m venv $(BRAINMARKS)
	$(MAKE) install PYTHON=$(BRAINMARKS)/bin/python EXTRAS='[brainmarks]'
	$(BRAINMARKS)/bin/python -m pip install --constraint envs/constraints.txt pytest pytest-timeout
	$(BRAINMARKS)/bin/python -m pip install --no-deps brainmarks==0.1.1
	@touch $@

$(KERNELS): $(INSTALLED)
	$(MAKE) kernels PYTHON=$(BIN)/python
	@touch $@

# Containers and conda environments are filled by these two, which take the Python that PYTHON names.
install: ## the package alone, into the Python that is active; containers do this
	$(PYTHON) -m pip install --constraint envs/constraints.txt --editable '.$(EXTRAS)'

# Without nvcc and without mamba-ssm's own CUDA extension, which serves Mamba-1 alone.
kernels: ## mamba-ssm's kernels beside it
	$(PYTHON) -m pip install --constraint envs/constraints.txt einops ninja packaging setuptools triton wheel
	MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE $(PYTHON) -m pip install \
		--no-build-isolation --no-deps --constraint envs/constraints.txt mamba-ssm
