# Everything runs in .venv, which the first target that needs it sets up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo embedded test test-slow lint format clean

demo: $(VENV)/.installed
	$(BIN)/python -m scaledown.demo

embedded: $(VENV)/.installed
	$(BIN)/python -m scaledown.world --output runs/embedded/world
	$(BIN)/python -m scaledown.world_generator --output runs/embedded/generator
	$(BIN)/python train.py recipes/embedded-n-layers.yaml
	$(BIN)/python evaluate.py --model runs/embedded/model --data runs/embedded/world/test.jsonl --num_documents 5 \
		--baselines full_text,no_documents,truncated,random_memory,shuffled_documents \
		--group_by answer_kind,hops --max_new_tokens 8 --batch_size 25
	$(BIN)/python -m scaledown.embed --model runs/embedded/model

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements.txt requirements-dev.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	touch $@ $(VENV)/.installed
