# Everything runs in .venv, which the first target that needs it sets up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SHORT := --num_facts 3 --plain true
# On two cores with bfloat16 and a C++ compiler it saves a third of the generator's time.
FAST ?= --bf16 true --torch_compile true
WORLD = $(BIN)/python -m scaledown.world
LESSON = $(BIN)/python train.py recipes/embedded-lesson.yaml

# Behind `make embedded`: joint and two-stage training, both kinds of compressor, and four rates.
COMPARED = runs/embedded/compared
N_LAYERS = recipes/embedded-first-lesson.yaml --generator_name_or_path runs/embedded/generator-14
ENCODER = recipes/embedded-encoder.yaml

.PHONY: demo embedded embedded-comparison test test-slow lint format clean

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

embedded-comparison: $(VENV)/.installed
	$(WORLD) --output $(COMPARED)/one --num_train 0 --num_validation 0 --num_test 500 --num_test_documents 1 \
		--num_documents 1 --two_hops 0 $(SHORT)
	$(BIN)/python -m scaledown.world_encoder --output runs/embedded/encoder
	$(BIN)/python train.py $(N_LAYERS) --output_dir $(COMPARED)/joint
	$(BIN)/python train.py $(N_LAYERS) --two_stage true --cache_dir $(COMPARED)/cache-1 --output_dir $(COMPARED)/two-stage
	$(BIN)/python experiments/naive_two_stage.py $(N_LAYERS) --two_stage true --cache_dir $(COMPARED)/cache-2 \
		--output_dir $(COMPARED)/naive
	$(BIN)/python train.py $(ENCODER) --output_dir $(COMPARED)/encoder-joint
	$(BIN)/python train.py $(ENCODER) --two_stage true --cache_dir $(COMPARED)/cache-3 \
		--output_dir $(COMPARED)/encoder-two-stage
	for name in joint two-stage naive encoder-joint encoder-two-stage; do \
		$(BIN)/python evaluate.py --model $(COMPARED)/$$name --data $(COMPARED)/one/test.jsonl --max_new_tokens 8 \
			--baselines full_text,no_documents --batch_size 50 --output_dir $(COMPARED)/results/$$name || exit 1; \
	done
	for rate in 4 8 16 32; do \
		$(BIN)/python train.py recipes/embedded-n-layers.yaml --model_name_or_path runs/embedded/model --max_steps 200 \
			--compression_rate $$rate --learning_rate 8e-4 --compressor_learning_rate 8e-4 --seed 1 \
			--output_dir $(COMPARED)/rate-$$rate && \
		$(BIN)/python evaluate.py --model $(COMPARED)/rate-$$rate --data runs/embedded/world/test.jsonl \
			--num_documents 5 --limit 500 --max_new_tokens 8 --baselines full_text,no_documents --batch_size 25 \
			--output_dir $(COMPARED)/results/rate-$$rate || exit 1; \
	done
	$(BIN)/python evaluate.py --compare $(COMPARED)/results/rate-4 $(COMPARED)/results/rate-8 \
		$(COMPARED)/results/rate-16 $(COMPARED)/results/rate-32 --output_dir $(COMPARED)/results/rates

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
