# Everything runs in .venv, which the first target that needs it sets up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# The model's tests, and what else reaches into transformers.
MODEL_TESTS := tests/model

.PHONY: demo test test-slow test-oldest test-newest lint format clean

demo: $(VENV)/.installed
	$(BIN)/python -m scaledown.tools.demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow

# The same with the oldest transformers that is supported, and with the newest on the registry: each in an environment
# over .venv, into which only what differs is installed.
test-oldest: OTHER := transformers==5.17.0
test-newest: OTHER := --upgrade transformers huggingface-hub tokenizers safetensors peft accelerate
test-oldest test-newest: test-%: $(VENV)/.installed-dev
	rm -rf $(VENV)-$*
	$(BIN)/python -m venv $(VENV)-$*
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" > \
		"$$($(VENV)-$*/bin/python -c "import site; print(site.getsitepackages()[0])")/over.pth"
	$(VENV)-$*/bin/python -m pip install --quiet $(OTHER)
	$(VENV)-$*/bin/python -c "import transformers; print('transformers', transformers.__version__)"
	$(VENV)-$*/bin/python -m pytest -n 2 $(MODEL_TESTS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest runs .pytest_cache .ruff_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements.txt requirements-dev.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	touch $@ $(VENV)/.installed

# make embedded, make embedded-comparison
include embedded.mk
