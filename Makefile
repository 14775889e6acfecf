# hbkit's commands. `make` alone lists them. PYTHON=... picks the interpreter that .venv is made from.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test test-core test-torch test-tensorflow test-slow test-debug asan fuzz gpu check format wheel clean

PYTHON ?= python3
HBKIT_SHARED ?= $(abspath ../shared)
BIN := $(CURDIR)/.venv/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
CODE := hbkit backends tests bench setup.py
# HBKIT_DEBUG=1 builds the extensions with every Cython check on, for any of the commands.
export HBKIT_DEBUG HBKIT_SHARED

help: ## list the commands
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 24

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("hbkit needs Python 3.11 or newer, and $(PYTHON) is %s (%s): name another one, as in  make PYTHON=python3.12 ..." % (sys.version.split()[0], sys.executable))'
	@command -v "$${CC:-cc}" >/dev/null || { echo "hbkit's extensions need a C compiler, and there is no '$${CC:-cc}': install gcc or clang, or set CC" >&2; exit 1; }
	$(PYTHON) -m venv .venv

# $(call install,EXTRAS): this checkout as a wheel (not editable), with the pinned build tools and dependencies.
# build/lib keeps modules that the checkout no longer has, so Python files there are built anew.
define install
	find build -path '*/lib*' -name '*.py' -delete 2>/dev/null || true
	$(PIP) install --constraint constraints.txt setuptools Cython
	$(PIP) install --constraint constraints.txt --no-build-isolation '.[$(1)]'
endef

.PHONY: install-demo install-dev
install-demo: | $(BIN)/python
	@echo "Installing hbkit[torch] into .venv (the first time takes a minute or two)"
	$(call install,torch)
install-dev: | $(BIN)/python
	@echo "Installing hbkit[torch,tensorflow-cpu,cuda,dev] into .venv"
	$(call install,torch$(COMMA)tensorflow-cpu$(COMMA)cuda$(COMMA)dev)
COMMA := ,

demo: install-demo ## train a DeepFM: on MovieLens-1M where it is at hand, else on synthetic clicks
	@export PATH="$(BIN):$$PATH"; \
	if [ -e "$(HBKIT_SHARED)/data/ml-1m/ratings.parquet" ]; then \
	    echo "MovieLens-1M is at hand, in $(HBKIT_SHARED)/data/ml-1m"; \
	    data=out/ml-1m; \
	    hbkit convert --format movielens "$(HBKIT_SHARED)/data/ml-1m" $$data --split 8:1:1 --seed 0 --overwrite; \
	else \
	    echo "No real data in $(HBKIT_SHARED)/data/ml-1m: making synthetic clicks"; \
	    data=out/synth; \
	    hbkit synth $$data/train.parquet --rows 300000 --shape criteo --seed 0 --overwrite; \
	    hbkit synth $$data/test.parquet --rows 50000 --shape criteo --seed 1 --overwrite; \
	fi; \
	rm -rf out/demo; \
	hbkit train --data $$data/train.parquet --eval-data $$data/test.parquet --label label \
	    --model deepfm --backend torch --save out/demo --seed 0; \
	echo "(hbkit is in .venv: run  source .venv/bin/activate  first)"

# The tests run from another directory, on the installed wheel. PyTorch and TensorFlow each get a process of their own.
PYTEST := cd .venv && $(BIN)/python -m pytest
test: install-dev ## install what the tests need, and run all but the long ones
	@$(MAKE) --no-print-directory -k test-torch test-tensorflow test-core
CORE := $(CURDIR)/tests --ignore=$(CURDIR)/tests/torch --ignore=$(CURDIR)/tests/tensorflow
test-core: ## only the tests of the core (after `make test` has installed)
	$(PYTEST) $(CORE) -m "not slow" -n 2
test-slow: install-dev ## the long tests: kills, races, power loss, soak, lost ranks
	$(PYTEST) $(CURDIR)/tests/torch -m slow
	$(PYTEST) $(CURDIR)/tests/tensorflow -m slow
	$(PYTEST) $(CORE) -m slow -n 2
test-torch: ## only the tests of the PyTorch adapter
	$(PYTEST) $(CURDIR)/tests/torch -m "not slow"
test-tensorflow: ## only the tests of the TensorFlow adapter
	$(PYTEST) $(CURDIR)/tests/tensorflow -m "not slow"
test-debug: ## the extensions' tests on a build with every Cython check on; leaves that build in .venv
	@$(MAKE) --no-print-directory install-dev HBKIT_DEBUG=1
	$(PYTEST) $(addprefix $(CURDIR)/tests/,ext ragged embedding) -m "not slow" -n 2

# $(call sanitize,NAME,KIND): the extensions by clang, with the sanitizers that setup.py means by KIND, in build/NAME/lib
define sanitize
	@command -v clang >/dev/null || { echo "this needs clang and its sanitizers, as in: apt-get install clang libclang-rt-14-dev" >&2; exit 1; }
	find build/$(1)/lib -name '*.py' -delete 2>/dev/null || true
	CC=clang HBKIT_SANITIZE=$(2) $(BIN)/python setup.py -q build --build-lib build/$(1)/lib
endef
# $(call sanitized,NAME,LIBRARY): Python on that build; the sanitizer's library must come before anything else.
sanitized = HBKIT_SANITIZE=1 LD_PRELOAD=$(2) PYTHONPATH=$(CURDIR)/build/$(1)/lib PYTHONMALLOC=malloc \
    UBSAN_OPTIONS=print_stacktrace=1 ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 $(BIN)/python

asan: install-dev ## the extensions' and the decoder's tests under AddressSanitizer and UBSan; needs clang
	$(call sanitize,asan,1)
	cd .venv && $(call sanitized,asan,$$(clang -print-file-name=libclang_rt.asan-$$(uname -m).so)) -m pytest -n 2 \
	    -m "not slow" $(addprefix $(CURDIR)/tests/,ext ragged store embedding parquet data_convert/test_tfrecord.py) \
	    --ignore=$(CURDIR)/tests/ext/test_cross.py

FUZZ_SECONDS ?= 60
fuzz: install-dev ## fuzz footers, pages and files for FUZZ_SECONDS; what was found lies in build/fuzz; needs clang
	$(PIP) install --constraint constraints.txt atheris
	$(call sanitize,fuzz,fuzz)
	cd build/fuzz && $(call sanitized,fuzz,$$($(BIN)/python -c 'import atheris; print(atheris.path())')/asan_with_fuzzer.so) \
	    $(CURDIR)/tests/parquet/fuzz.py corpus -max_total_time=$(FUZZ_SECONDS) -timeout=10

GPU_REPORT ?= out/gpu.md
gpu: install-dev ## on a machine with an NVIDIA GPU: the tests that need one, then the figures of docs/gpu.md
	@mkdir -p $(dir $(GPU_REPORT))
	$(PYTEST) $(CURDIR)/tests/cuda $(CURDIR)/tests/store/test_device.py -k "not cudasim and not simulator"
	cd .venv && $(BIN)/python $(CURDIR)/bench/gpu.py --report $(abspath $(GPU_REPORT))
	cd .venv && $(BIN)/python $(CURDIR)/bench/gpu_index.py | tee -a $(abspath $(GPU_REPORT))

check: install-dev ## style, types and arrows; `make format` mends what can be mended
	@export PATH="$(BIN):$$PATH" failed=0; \
	run() { echo "+ $$*"; "$$@" || failed=1; }; \
	run ruff check $(CODE); \
	run ruff format --check $(CODE); \
	run mypy; \
	run env PYTHONPATH=backends lint-imports; \
	run cython-lint hbkit; \
	exit $$failed

format: install-dev ## the fixer twin of `make check`
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

wheel: install-dev ## build dist/*.tar.gz and dist/*.whl, as a user's pip would
	rm -rf dist
	find build -path '*/lib*' -name '*.py' -delete 2>/dev/null || true
	$(BIN)/python -m build --quiet --outdir dist .

clean: ## remove everything that was built, .venv included
	rm -rf .venv build dist out hbkit.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache
	find hbkit backends tests bench \( -name '*.so' -o -name '__pycache__' \) -prune -exec rm -rf {} +
