# Everything runs in .venv, which the first target that needs it sets up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SHORT := --num_facts 3 --plain true
# On two cores with bfloat16 and a C++ compiler it saves a third of the generator's time.
FAST ?= --bf16 true --torch_compile true
WORLD = $(BIN)/python -m scaledown.world
LESSON = $(BIN)/python train.py recipes/embedded-lesson.yaml

.PHONY: demo embedded test test-slow lint format clean

demo: $(VENV)/.installed
	$(BIN)/python -m scaledown.demo

embedded: $(VENV)/.installed
	$(WORLD) --output runs/embedded/world
	$(WORLD) --output runs/embedded/lesson-1 --num_train 60000 --num_documents 1 --two_hops 0 $(SHORT)
	$(WORLD) --output runs/embedded/lesson-2 --num_train 30000 --num_documents 2 --two_hops 0 $(SHORT)
	$(WORLD) --output runs/embedded/lesson-3 --num_train 28000 --num_documents 1 --two_hops 0
	$(WORLD) --output runs/embedded/lesson-4 --num_train 12000 --num_documents 2 --two_hops 0
	$(WORLD) --output runs/embedded/lesson-7 --num_train 62000 --num_documents 5 --two_hops 0.3 --seed 1
	$(WORLD) --output runs/embedded/lesson-8 --num_train 58000 --num_documents 5 --two_hops 0.4 --seed 2
	$(BIN)/python -m scaledown.world_generator --output runs/embedded/generator --num_lessons 12
	$(BIN)/python train.py recipes/embedded-first-lesson.yaml
	$(LESSON) --train_file runs/embedded/lesson-2/train.jsonl --max_steps 460 \
		--model_name_or_path runs/embedded/model-1 --output_dir runs/embedded/model-2
	$(LESSON) --train_file runs/embedded/lesson-3/train.jsonl --max_steps 420 \
		--model_name_or_path runs/embedded/model-2 --output_dir runs/embedded/model-3
	$(LESSON) --train_file runs/embedded/lesson-4/train.jsonl --max_steps 180 \
		--model_name_or_path runs/embedded/model-3 --output_dir runs/embedded/model-4
	$(BIN)/python train.py recipes/embedded-n-layers.yaml
	$(BIN)/python train.py recipes/embedded-n-layers.yaml --max_steps 320 --seed 1 \
		--learning_rate 1.2e-3 --compressor_learning_rate 1.2e-3 \
		--model_name_or_path runs/embedded/model-5 --output_dir runs/embedded/model-6
	cp -R runs/embedded/generator/. runs/embedded/generator-13
	$(BIN)/python -m scaledown.world_generator --output runs/embedded/generator-13 --num_lessons 13 $(FAST)
	$(BIN)/python -m scaledown.replace_generator --model runs/embedded/model-6 \
		--generator runs/embedded/generator-13 --output runs/embedded/model-6-13
	$(BIN)/python train.py recipes/embedded-n-layers.yaml --max_steps 1800 \
		--learning_rate 1.2e-3 --compressor_learning_rate 1.2e-3 \
		--train_file runs/embedded/lesson-7/train.jsonl \
		--model_name_or_path runs/embedded/model-6-13 --output_dir runs/embedded/model-7
	cp -R runs/embedded/generator-13/. runs/embedded/generator-14
	$(BIN)/python -m scaledown.world_generator --output runs/embedded/generator-14 $(FAST)
	$(BIN)/python -m scaledown.replace_generator --model runs/embedded/model-7 \
		--generator runs/embedded/generator-14 --output runs/embedded/model-7-14
	$(BIN)/python train.py recipes/embedded-n-layers.yaml --max_steps 1700 \
		--learning_rate 1.2e-3 --compressor_learning_rate 1.2e-3 \
		--train_file runs/embedded/lesson-8/train.jsonl \
		--model_name_or_path runs/embedded/model-7-14 --output_dir runs/embedded/model
	$(BIN)/python evaluate.py --model runs/embedded/model --data runs/embedded/world/test.jsonl --num_documents 5 \
		--baselines full_text,no_documents,truncated,random_memory,shuffled_documents \
		--group_by answer_kind,hops --max_new_tokens 8 --batch_size 25 --update_card true
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
