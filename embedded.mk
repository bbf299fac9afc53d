# The embedded model from scratch, and comparisons on its world. After a stop, the same command resumes after the last step.
E := runs/embedded
SHORT := --num_facts 3 --plain true
# Saves a third of the generator's training time; requires bfloat16 and a C++ compiler. `FAST=` avoids both.
FAST ?= --bf16 true --torch_compile true
PY := $(BIN)/python
TRAIN = $(PY) train.py recipes/embedded-$(1).yaml --output_dir $(@D)
NAMES := --num_documents 5 --alike 1 --same_facts true --num_facts 2 --plain true
RATE = --learning_rate $(1) --compressor_learning_rate $(1)
define ON_GENERATOR
	$(PY) -m scaledown.tools.replace_generator --model $(<D) --generator $(E)/generator-$(1) --output $(<D)-$(1)
	$(call TRAIN,n-layers) --model_name_or_path $(<D)-$(1) $(call RATE,1.2e-3)
endef
NEXT = $(call TRAIN,n-layers) --model_name_or_path $(<D) --train_file $(E)/lesson-$(1)/train.jsonl $(call RATE,$(2))
LISTS := --max_answer_length 48
BY_NAME_ALONE := --two_hops 0 --alike 1 --same_facts true $(SHORT)
SHORT_LESSON := --per_device_train_batch_size 64 --compression_rate 4
RESULT := all_results.json
READY := | $(VENV)/.installed

.PHONY: embedded embedded-encoder embedded-reader embedded-comparison

embedded: $(E)/model/$(RESULT)
	$(PY) evaluate.py --model $(E)/model --data $(E)/world/test.jsonl --num_documents 5 \
		--baselines full_text,no_documents,truncated,random_memory,shuffled_documents \
		--group_by answer_kind,hops --max_new_tokens 8 --batch_size 25 --update_card true
	$(PY) -m scaledown.tools.embed --model $(E)/model

# Records. A lesson's test.jsonl is written last, so it marks the lesson as complete.
$(E)/lesson-1/test.jsonl: OPTIONS = --num_train 60000 --num_documents 1 --two_hops 0 $(SHORT)
$(E)/lesson-2/test.jsonl: OPTIONS = --num_train 30000 --num_documents 2 --two_hops 0 $(SHORT)
$(E)/lesson-3/test.jsonl: OPTIONS = --num_train 28000 --num_documents 1 --two_hops 0
$(E)/lesson-4/test.jsonl: OPTIONS = --num_train 12000 --num_documents 2 --two_hops 0
$(E)/lesson-7/test.jsonl: OPTIONS = --num_train 62000 --num_documents 5 --two_hops 0.3 --seed 1
$(E)/lesson-8/test.jsonl: OPTIONS = --num_train 58000 --num_documents 5 --two_hops 0.4 --seed 2
$(E)/lesson-9/test.jsonl: OPTIONS = --num_train 60000 --num_documents 4 --two_hops 0.8 --alike 1 --seed 4 $(SHORT)
$(E)/lesson-10/test.jsonl: OPTIONS = --num_train 64000 --num_documents 5 --two_hops 0.5 --alike 0.4 --seed 3
$(E)/lesson-11/test.jsonl: OPTIONS = --num_train 112000 --two_hops 0.85 --lists 0.7 --seed 5 $(NAMES)
$(E)/lesson-12/test.jsonl: OPTIONS = --num_train 32000 --two_hops 0.9 --lists 0.3 --seed 6 $(NAMES)
$(E)/lesson-13/test.jsonl: OPTIONS = --num_train 100000 --num_documents 5 --two_hops 0.55 --alike 0.5 --lists 0.3 --seed 5
$(E)/lesson-reader/test.jsonl: OPTIONS = --num_train 60000 --num_documents 5 --two_hops 0.55 --alike 0.5 --seed 5
$(E)/lesson-repeats/test.jsonl: OPTIONS = --num_train 60000 --num_documents 1 --two_hops 0 --repeats 0.5 $(SHORT)
$(E)/lesson-14/test.jsonl: OPTIONS = --num_train 14000 --num_documents 5 --two_hops 0.35 --alike 0.3 --seed 7
$(E)/lesson-16/test.jsonl: OPTIONS = --num_train 40000 --num_documents 5 --two_hops 0.25 --alike 0.5 --seed 8 --mixed_names 0.7
$(E)/lesson-names/test.jsonl: OPTIONS = --num_train 32000 --num_documents 2 --seed 11 $(BY_NAME_ALONE)
$(E)/lesson-mixed-names/test.jsonl: OPTIONS = --num_train 32000 --num_documents 2 --seed 12 $(BY_NAME_ALONE) --mixed_names 0.5
$(E)/lesson-four-names/test.jsonl: OPTIONS = --num_train 24000 --num_documents 4 --seed 13 $(BY_NAME_ALONE) --mixed_names 0.5
$(E)/lesson-two-long/test.jsonl: OPTIONS = --num_train 24000 --num_documents 2 --two_hops 0 --alike 0.6 --seed 14 --mixed_names 0.5
$(E)/lesson-five-long/test.jsonl: OPTIONS = --num_train 32000 --two_hops 0 --alike 0.3 --seed 15 --mixed_names 0.5
$(E)/lesson-%/test.jsonl: $(READY)
	$(PY) -m scaledown.world.world --output $(@D) $(OPTIONS)

$(E)/world/test.jsonl: $(READY)
	$(PY) -m scaledown.world.world --output $(@D)

# The generator: twelve lessons, then further ones.
$(E)/generator/.done: $(READY)
	$(PY) -m scaledown.world.generator --output $(@D) --num_lessons 12
	touch $@

$(E)/generator-13/.done: $(E)/generator/.done
$(E)/generator-14/.done: $(E)/generator-13/.done
$(E)/generator-16/.done: $(E)/generator-14/.done
$(E)/generator-%/.done:
	test -d $(@D) || cp -R $(<D) $(@D)
	rm -f $@
	$(PY) -m scaledown.world.generator --output $(@D) --num_lessons $* $(FAST)
	touch $@

# ScaleDown on that generator: lessons 1 to 6, then further ones on generators with more lessons.
$(E)/model-1/$(RESULT): $(E)/generator/.done $(E)/lesson-1/test.jsonl
	$(call TRAIN,first-lesson)

$(E)/model-2/$(RESULT): $(E)/model-1/$(RESULT) $(E)/lesson-2/test.jsonl
	$(call TRAIN,lesson) --model_name_or_path $(<D) --train_file $(E)/lesson-2/train.jsonl --max_steps 460

$(E)/model-3/$(RESULT): $(E)/model-2/$(RESULT) $(E)/lesson-3/test.jsonl
	$(call TRAIN,lesson) --model_name_or_path $(<D) --train_file $(E)/lesson-3/train.jsonl --max_steps 420

$(E)/model-4/$(RESULT): $(E)/model-3/$(RESULT) $(E)/lesson-4/test.jsonl
	$(call TRAIN,lesson) --model_name_or_path $(<D) --train_file $(E)/lesson-4/train.jsonl --max_steps 180

$(E)/model-5/$(RESULT): $(E)/model-4/$(RESULT) $(E)/world/test.jsonl
	$(call TRAIN,n-layers)

$(E)/model-6/$(RESULT): $(E)/model-5/$(RESULT) $(E)/world/test.jsonl
	$(call TRAIN,n-layers) --model_name_or_path $(<D) --max_steps 320 --seed 1 $(call RATE,1.2e-3)

$(E)/model-7/$(RESULT): $(E)/model-6/$(RESULT) $(E)/generator-13/.done $(E)/lesson-7/test.jsonl
	$(call ON_GENERATOR,13) --train_file $(E)/lesson-7/train.jsonl --max_steps 1800

$(E)/model-8/$(RESULT): $(E)/model-7/$(RESULT) $(E)/generator-14/.done $(E)/lesson-8/test.jsonl
	$(call ON_GENERATOR,14) --train_file $(E)/lesson-8/train.jsonl --max_steps 1700

# The question does not reveal which passage answers the second hop: scores of such contexts teach little.
$(E)/model-9/$(RESULT): $(E)/model-8/$(RESULT) $(E)/generator-16/.done $(E)/lesson-9/test.jsonl
	$(call ON_GENERATOR,16) --train_file $(E)/lesson-9/train.jsonl --max_steps 1200 \
		--per_device_train_batch_size 64 --reranking_loss_weight 0.1

$(E)/model-10/$(RESULT): $(E)/model-9/$(RESULT) $(E)/lesson-10/test.jsonl
	$(call NEXT,10,1e-3) --max_steps 1050 --reranking_loss_weight 0.25

# Names in slots that alone decide which passage to read; then questions that need them, then long passages.
$(E)/model-11/$(RESULT): $(E)/model-10/$(RESULT) $(E)/lesson-11/test.jsonl
	$(call NEXT,11,8e-4) $(LISTS) --max_steps 1750 --reranking_loss_weight 0.1 $(SHORT_LESSON)

$(E)/model-12/$(RESULT): $(E)/model-11/$(RESULT) $(E)/lesson-12/test.jsonl
	$(call NEXT,12,8e-4) $(LISTS) --max_steps 500 --reranking_loss_weight 0.05 $(SHORT_LESSON)

$(E)/model-13/$(RESULT): $(E)/model-12/$(RESULT) $(E)/lesson-13/test.jsonl
	$(call NEXT,13,8e-4) $(LISTS) --max_steps 2200 --reranking_loss_weight 0.25 --compression_rate 16

# Lists ended at positions where longer prompts have questions: so no lists, and prompts as long as with 20 passages.
$(E)/model-14/$(RESULT): $(E)/model-13/$(RESULT) $(E)/lesson-14/test.jsonl
	$(call NEXT,14,4e-4) --max_steps 180 --reranking_loss_weight 0.25 --compression_rate 4

$(E)/model-15/$(RESULT): $(E)/model-14/$(RESULT) $(E)/lesson-14/test.jsonl
	$(call NEXT,14,3e-4) --max_steps 180 --reranking_loss_weight 0.25 --compression_rate 16 --seed 1

# Names of books and ships were memorized: now they have too many names for that.
$(E)/model/$(RESULT): $(E)/model-15/$(RESULT) $(E)/lesson-16/test.jsonl
	$(call NEXT,16,8e-4) --max_steps 1200 --reranking_loss_weight 0.25 --compression_rate 16 --seed 2

# A second model, with an encoder as the compressor, on the generator of the checkpoint in the repository's root. First
# every token gets a slot, then more and more tokens share one, then passages are distinguished by name.
EM := $(E)/encoder-model
LESSON = $(call TRAIN,lesson) --model_name_or_path $(<D) --train_file $(E)/lesson-$(1)/train.jsonl
REPEATS = $(call LESSON,repeats) --max_answer_length 64

embedded-encoder: $(EM)/$(RESULT)
	$(PY) evaluate.py --model $(EM) --data $(E)/lesson-five-long/test.jsonl --num_documents 5 --max_new_tokens 8 --batch_size 25

$(E)/own-generator/.done: $(READY)
	$(PY) -m scaledown.tools.extract_generator --model . --output $(@D)
	touch $@

$(E)/encoder/.done: $(READY)
	$(PY) -m scaledown.world.encoder --output $(@D) --num_lessons 3 $(FAST)
	touch $@

$(EM)-begun/$(RESULT): $(E)/own-generator/.done $(E)/encoder/.done $(E)/lesson-repeats/test.jsonl
	$(call TRAIN,encoder)
$(EM)-rate-1/$(RESULT): $(EM)-begun/$(RESULT)
	$(REPEATS) --max_steps 800 --seed 1 $(call RATE,3e-3)
$(EM)-rate-2/$(RESULT): $(EM)-rate-1/$(RESULT)
	$(REPEATS) --max_steps 150 --seed 2 --compression_rate 2
$(EM)-rate-4/$(RESULT): $(EM)-rate-2/$(RESULT)
	$(REPEATS) --max_steps 200 --seed 4 --compression_rate 4
$(EM)-rate-8/$(RESULT): $(EM)-rate-4/$(RESULT)
	$(REPEATS) --max_steps 250 --seed 8 --compression_rate 8
$(EM)-rate-16/$(RESULT): $(EM)-rate-8/$(RESULT)
	$(REPEATS) --max_steps 400 --seed 16 --compression_rate 16
$(EM)-1/$(RESULT): $(EM)-rate-16/$(RESULT) $(E)/lesson-1/test.jsonl
	$(call LESSON,1) --max_steps 400 --seed 3 --lr_scheduler_type cosine
$(EM)-2/$(RESULT): $(EM)-1/$(RESULT) $(E)/lesson-2/test.jsonl
	$(call LESSON,2) --max_steps 300 --seed 2
# Passages that only their names distinguish, and scores that weigh more than answers: so names must be compared.
BY_NAME := --reranking_loss_weight 2
$(EM)-3/$(RESULT): $(EM)-2/$(RESULT) $(E)/lesson-names/test.jsonl
	$(call LESSON,names) --max_steps 400 --seed 2 $(BY_NAME)
$(EM)-4/$(RESULT): $(EM)-3/$(RESULT) $(E)/lesson-mixed-names/test.jsonl
	$(call LESSON,mixed-names) --max_steps 400 --seed 3 $(BY_NAME)
$(EM)-5/$(RESULT): $(EM)-4/$(RESULT) $(E)/lesson-four-names/test.jsonl
	$(call LESSON,four-names) --max_steps 300 --seed 4 $(BY_NAME)
$(EM)-6/$(RESULT): $(EM)-5/$(RESULT) $(E)/lesson-two-long/test.jsonl
	$(call LESSON,two-long) --max_steps 375 --seed 5 $(BY_NAME)
$(EM)/$(RESULT): $(EM)-6/$(RESULT) $(E)/lesson-five-long/test.jsonl
	$(call NEXT,five-long,1.5e-3) --max_steps 600 --seed 6 --reranking_loss_weight 1

# A reader: the same generator, whose LoRA learned from whole passages what ScaleDown's two longest lessons hold.
READER = $(call TRAIN,reader) --train_file $(E)/lesson-$(1)/train.jsonl

embedded-reader: $(E)/reader/$(RESULT) $(E)/world/test.jsonl
	$(PY) evaluate.py --model . --data $(E)/world/test.jsonl --num_documents 5 --reader $(E)/reader \
		--baselines full_text,no_documents --group_by answer_kind,hops --max_new_tokens 8 --batch_size 25

$(E)/reader-13/$(RESULT): $(E)/own-generator/.done $(E)/lesson-reader/test.jsonl
	$(call READER,reader)
$(E)/reader/$(RESULT): $(E)/reader-13/$(RESULT) $(E)/lesson-16/test.jsonl
	$(call READER,16) --lora_name_or_path $(<D) --max_steps 1200 --seed 2

# Comparisons: joint and two-stage training, both kinds of compressor, four rates.
C := $(E)/compared
ONE_PASSAGE := joint two-stage naive encoder-joint encoder-two-stage
RATES := 4 8 16 32
N_LAYERS := recipes/embedded-first-lesson.yaml --generator_name_or_path $(E)/generator-14
# Directly at 16 tokens per slot, and only the first lesson, like the others.
ENCODER := recipes/embedded-encoder.yaml --generator_name_or_path $(E)/generator-14 \
	--compressor_name_or_path $(E)/encoder-5 --num_memory_tokens 32 --compression_rate 16 \
	--train_file $(E)/lesson-1/train.jsonl --max_answer_length 16 --max_steps 900
TWO_STAGE = --two_stage true --cache_dir $(@D)-cache

embedded-comparison: $(ONE_PASSAGE:%=$(C)/results/%/metrics.json) $(RATES:%=$(C)/results/rate-%/metrics.json)
	rm -rf $(C)/results/rates
	$(PY) evaluate.py --compare $(RATES:%=$(C)/results/rate-%) --output_dir $(C)/results/rates

$(E)/encoder-5/.done: $(E)/encoder/.done
	test -d $(@D) || cp -R $(<D) $(@D)
	rm -f $@
	$(PY) -m scaledown.world.encoder --output $(@D) --num_lessons 5 $(FAST)
	touch $@

$(C)/one/test.jsonl: $(READY)
	$(PY) -m scaledown.world.world --output $(@D) --num_train 0 --num_validation 0 --num_test 500 --num_documents 1 \
		--num_test_documents 1 --two_hops 0 $(SHORT)

$(C)/joint/$(RESULT) $(C)/two-stage/$(RESULT) $(C)/naive/$(RESULT): $(E)/generator-14/.done $(E)/lesson-1/test.jsonl
$(C)/joint/$(RESULT):
	$(PY) train.py $(N_LAYERS) --output_dir $(@D)
$(C)/two-stage/$(RESULT):
	$(PY) train.py $(N_LAYERS) --output_dir $(@D) $(TWO_STAGE)
$(C)/naive/$(RESULT):
	$(PY) experiments/naive_two_stage.py $(N_LAYERS) --output_dir $(@D) $(TWO_STAGE)

$(C)/encoder-joint/$(RESULT) $(C)/encoder-two-stage/$(RESULT): \
		$(E)/encoder-5/.done $(E)/generator-14/.done $(E)/lesson-1/test.jsonl
$(C)/encoder-joint/$(RESULT):
	$(PY) train.py $(ENCODER) --slot_pooling memory_tokens --output_dir $(@D)
$(C)/encoder-two-stage/$(RESULT):
	$(PY) train.py $(ENCODER) --output_dir $(@D) $(TWO_STAGE)

$(C)/rate-%/$(RESULT): $(E)/model-8/$(RESULT) $(E)/world/test.jsonl
	$(call TRAIN,n-layers) --model_name_or_path $(<D) --max_steps 200 --seed 1 --compression_rate $* \
		$(call RATE,8e-4)

$(C)/results/rate-%/metrics.json: $(C)/rate-%/$(RESULT)
	rm -rf $(@D)
	$(PY) evaluate.py --model $(C)/rate-$* --data $(E)/world/test.jsonl --num_documents 5 --limit 500 \
		--baselines full_text,no_documents --max_new_tokens 8 --batch_size 25 --output_dir $(@D)

$(C)/results/%/metrics.json: $(C)/%/$(RESULT) $(C)/one/test.jsonl
	rm -rf $(@D)
	$(PY) evaluate.py --model $(C)/$* --data $(C)/one/test.jsonl --baselines full_text,no_documents \
		--max_new_tokens 8 --batch_size 50 --output_dir $(@D)

.SECONDARY:
