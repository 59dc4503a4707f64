# make help lists the targets. bench and test each do their own set-up on a fresh machine.

PYTHON ?= python3
# another PyTorch for .venv than the pinned one, such as TORCH=2.13.0
TORCH ?=
BENCH_ARGS ?=
# the CUDA library takes minutes: make cuda builds it, or make setup PPCR_BUILD_CUDA=auto
export PPCR_BUILD_CUDA ?= 0
PYTEST_ARGS ?=
# in one process, for a debugger: PYTEST_ARGS='-n 0 --pdb -k gate'
PROCESSES := -n auto --maxprocesses 4 --dist loadfile
# of make test-versions: --cells oldest,middle,newest, and more
VERSIONS ?=
# of make gpu: --only tests,plans, and more
GPU_ARGS ?=
# of make mutate: sample, shared, cpu, cuda, triton, host, or words of their names
MUTANTS ?=
# an index with PyTorch's CPU-only builds, for the small environment of test-minimal
TORCH_CPU_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
MINIMAL := .venv-minimal
MINIMAL_TORCH := 2.13.0
COPY := build/minimal
ABI := build/abi
IMPORTED_FROM = import ppcr_ext; assert '$(1)' in ppcr_ext.__file__, ppcr_ext.__file__
PIP_INSTALL := -m pip install --disable-pip-version-check --no-input

RECIPES := setup.py pyproject.toml $(wildcard ppcr_ext/_build/*.py)
NATIVE := $(shell find csrc -type f 2>/dev/null) $(RECIPES)
PACKAGE := $(NATIVE) $(shell find ppcr_ext -name '*.py' 2>/dev/null) MANIFEST.in README.md LICENSE
# what the sdist holds
TRACKED = $(wildcard $(shell git ls-files 2>/dev/null))
CXX_FILES = $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# Stamps: what is installed and built, so that a second make has nothing to do.
INSTALLED := $(VENV)/.installed-$(if $(TORCH),$(TORCH),pinned)
BUILT := build/.built-$(if $(TORCH),$(TORCH),pinned)
PACKAGED := build/.packaged

.PHONY: help setup bench bench-full docs results test test-slow test-property test-minimal \
    test-abi test-versions test-sdist package sanitize compilers arm mutate cuda cuda-report \
    cuda-host gpu gpu-rehearsal lock lint format clean

# A target's "##" puts it into the list of users, "#@" into that of maintainers.
help:  ## this list
	@echo "for users"
	@sed -nE 's/^([a-z-]+):.*## /  \1\t/p' $(MAKEFILE_LIST) | expand -t 18
	@echo "for maintainers"
	@sed -nE 's/^([a-z-]+):.*#@ /  \1\t/p' $(MAKEFILE_LIST) | expand -t 18
	@echo "variables: PYTHON=python3.12  TORCH=2.13.0  BENCH_ARGS='shapes --rounds 50'" \
	    "PYTEST_ARGS='-k gate'"

setup: $(BUILT)  ## .venv with the pinned packages, and ppcr_ext installed in place

$(INSTALLED): requirements/dev.txt
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -c \
	    'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "the pinned packages need" \
	    "Python 3.11 or newer: make PYTHON=python3.12 ..., without $(VENV)" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# uv makes environments without pip
	@$(BIN)/python -c 'import pip' 2>/dev/null || $(BIN)/python -m ensurepip >/dev/null || \
	    { echo "$(VENV) has no pip: install one there, or remove $(VENV)" \
	    "and let make set it up" >&2; exit 1; }
	rm -f $(VENV)/.installed-*
	$(BIN)/python $(PIP_INSTALL) $(if $(TORCH),torch==$(TORCH) torchvision -r requirements/dev.in,\
	    --require-hashes -r requirements/dev.txt)
	touch $@

$(BUILT): $(INSTALLED) $(NATIVE)
	rm -f build/.built-*
	$(BIN)/python $(PIP_INSTALL) --no-build-isolation --no-deps --editable .
	mkdir -p build && touch $@

bench: $(BUILT)  ## errors and speed on real feature maps beside plain PyTorch; files go to results/
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

bench-full: $(BUILT)  ## operators, scaling and whole networks; BENCH_ARGS=--quick for three minutes
	$(BIN)/python -m benchmarks operators $(BENCH_ARGS)
	$(BIN)/python -m benchmarks scaling $(BENCH_ARGS)
	$(BIN)/python -m benchmarks end-to-end $(BENCH_ARGS)

docs: $(BUILT)  ## the documentation as a site in build/docs, warnings as errors
	$(BIN)/python -m sphinx -q -n -W --keep-going docs build/docs

results: $(BUILT)  #@ take results/ into benchmarks/results/, and its tables into the README
	$(BIN)/python -m benchmarks.render --take results

test: $(BUILT)  ## the tests, about 15 minutes on two cores
	$(BIN)/python -m pytest $(PROCESSES) $(PYTEST_ARGS)

test-slow: $(BUILT)  #@ what takes minutes: exhaustive sweeps
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

test-property: $(BUILT)  #@ thousands of random inputs, drawn anew, against float64
	PPCR_HYPOTHESIS=nightly $(BIN)/python -m pytest tests/test_properties.py $(PYTEST_ARGS)

sanitize: $(BUILT)  #@ the kernels, on the CPU, under AddressSanitizer, UBSan and ThreadSanitizer
	$(BIN)/python tools/sanitize.py

compilers: $(INSTALLED)  #@ the CPU kernels by the oldest promised compilers, g++ 11 and clang 14
	$(BIN)/python tools/sanitize.py old

arm: $(INSTALLED)  #@ the kernels compiled for 64-bit Arm, and run under emulation
	$(BIN)/python tools/sanitize.py arm

mutate: $(BUILT)  #@ plants faults and checks that the tests find them; MUTANTS=sample for a few
	$(BIN)/python tools/mutate.py $(MUTANTS)

package: $(PACKAGED)  #@ sdist and wheel in dist/: contents, types, installations

$(PACKAGED): $(BUILT) $(MINIMAL)/.installed $(PACKAGE) $(TRACKED)
	$(BIN)/python tools/check_package.py $(MINIMAL)/bin/python
	touch $@

test-sdist: $(PACKAGED)  #@ make test in the unpacked sdist
	rm -rf build/sdist && mkdir -p build/sdist
	tar -xzf dist/*.tar.gz -C build/sdist --strip-components 1
	$(BIN)/python -m venv --without-pip build/sdist/$(VENV)
	@# It sees this environment's packages, but not what its .pth files name, such as ppcr_ext.
	cd build/sdist/$(VENV)/lib/python*/site-packages && $(abspath $(BIN))/python -c \
	    'import sysconfig; print(sysconfig.get_path("purelib"))' >packages.pth
	touch build/sdist/$(INSTALLED)
	$(MAKE) -C build/sdist setup
	cd build/sdist/tests && ../$(BIN)/python -c "$(call IMPORTED_FROM,build/sdist/)"
	$(MAKE) -C build/sdist test

# The package is installed, from a copy, into a venv of its own: two versions of PyTorch never share
# a build folder, and the tests run where the source tree cannot be imported by accident.
test-minimal: $(MINIMAL)/.package  #@ the core tests with a CPU-only PyTorch, without Triton
	cd tests && ../$(MINIMAL)/bin/python -c "$(call IMPORTED_FROM,$(MINIMAL))"
	cd tests && ../$(MINIMAL)/bin/python -m pytest --import-mode=importlib \
	    -m "not full and not gpu and not slow" $(PYTEST_ARGS)

test-abi: $(PACKAGED)  #@ the wheel of the pinned PyTorch, with another, CPU-only
	rm -rf $(ABI)
	$(MINIMAL)/bin/python $(PIP_INSTALL) --no-deps --no-index --target $(ABI) dist/*.whl
	cd tests && PYTHONPATH=../$(ABI) ../$(MINIMAL)/bin/python -c "$(call IMPORTED_FROM,$(ABI))"
	cd tests && PYTHONPATH=../$(ABI) ../$(MINIMAL)/bin/python -m pytest --import-mode=importlib \
	    -m "not full" test_definition.py test_pytorch.py test_edges.py $(PYTEST_ARGS)

test-versions: $(PACKAGED)  #@ every promised PyTorch, 5 GB each; VERSIONS='--cells oldest'
	$(BIN)/python tools/test_versions.py $(VERSIONS)

$(MINIMAL)/.installed: requirements/minimal.txt
	test -x $(MINIMAL)/bin/python || $(PYTHON) -m venv $(MINIMAL)
	$(MINIMAL)/bin/python $(PIP_INSTALL) --require-hashes -r $<
	$(MINIMAL)/bin/python $(PIP_INSTALL) torch==$(MINIMAL_TORCH) \
	    $(if $(TORCH_CPU_INDEX),--extra-index-url $(TORCH_CPU_INDEX))
	touch $@

$(MINIMAL)/.package: $(MINIMAL)/.installed $(PACKAGE)
	mkdir -p $(COPY) && rm -rf $(COPY)/csrc $(COPY)/ppcr_ext
	cp -Rp csrc ppcr_ext setup.py pyproject.toml MANIFEST.in README.md LICENSE $(COPY)
	rm -f $(COPY)/ppcr_ext/*.so $(COPY)/ppcr_ext/_build.json
	$(MINIMAL)/bin/python $(PIP_INSTALL) -v --no-build-isolation --no-deps --force-reinstall ./$(COPY)
	touch $@

cuda: $(BUILT)  ## the CUDA library, by nvcc; TORCH_CUDA_ARCH_LIST=9.0 for one architecture
	PPCR_BUILD_CUDA=1 $(BIN)/python $(PIP_INSTALL) -v --no-build-isolation --no-deps --editable .

cuda-report: $(BUILT)  #@ results/: estimated speed of every plan, machine code of every kernel
	$(BIN)/python tools/cuda_estimates.py
	$(BIN)/python tools/cuda_report.py
	$(BIN)/python tools/triton_report.py

cuda-host: $(BUILT)  #@ PyTorch's CUDA calls tested on an emulated CUDA runtime: needs nvcc, no GPU
	$(BIN)/python tests/cuda_host/build.py
	$(BIN)/python -m pytest tests/test_cuda_host.py $(PYTEST_ARGS)

gpu:  ## on a machine with a GPU: build, GPU tests, sanitizers, benchmark; files go to results/gpu
	$(PYTHON) tools/gpu.py --out results/gpu $(GPU_ARGS)

gpu-rehearsal: $(BUILT)  #@ runs make gpu on emulated devices: its times mean nothing
	$(BIN)/python tests/cuda_host/build.py "9.0 9.0" $(abspath $(BIN))/python tools/gpu.py \
	    --rehearsal --out ../rehearsal $(GPU_ARGS)

LOCK = uv pip compile --universal --python-version 3.11 --generate-hashes --no-annotate \
    --custom-compile-command "make lock" --quiet

lock:  #@ requirements/*.txt from *.in, with hashes; LOCK_ARGS=--upgrade for newer versions
	$(LOCK) $(LOCK_ARGS) requirements/torch.in requirements/dev.in -o requirements/dev.txt
	$(LOCK) $(LOCK_ARGS) requirements/minimal.in -o requirements/minimal.txt

lint: $(BUILT)  #@ ruff, clang-format, mypy, and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(BUILT)  #@ rewrite the sources as lint wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:  ## remove what was built and measured; the virtual environments stay
	rm -rf build dist results *.egg-info .pytest_cache .mypy_cache .ruff_cache
	rm -f ppcr_ext/*.so ppcr_ext/_build.json $(MINIMAL)/.package
