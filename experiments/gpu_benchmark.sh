#!/usr/bin/env bash
# Answers of Mistral-7B's shape on one GPU by the paper's protocol (10 x 128 tokens, 32 new ones): four minutes on an
# H200, which a batch of 256 needs. GENERATOR, COMPRESSORS and BATCHES try it with other shapes.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=.
python=${PYTHON:-python3} out=${1:-runs/benchmark/gpu}
generator=${GENERATOR:-mistral-7b} compressors=${COMPRESSORS:-5,8,llama-3.2-1b,modernbert-base}
"$python" benchmark.py --mode speed --generator "$generator" --compressors "$compressors" \
    --sweep "batch_size=${BATCHES:-32,256}" --repeats 2 --output_dir "$out/plain"
"$python" experiments/gpu_profile.py --generator "$generator" --compressor "${compressors%%,*}" --output "$out/profile.txt"
"$python" benchmark.py --mode speed --generator "$generator" --compressors "${compressors%%,*}" --compile true \
    --repeats 5 --output_dir "$out/compiled"
"$python" benchmark.py --mode speed --generator "$generator" --compressors "${compressors%%,*}" --rivals true \
    --query_length 16 --batch_size "${RIVALS_BATCH:-32}" --repeats 2 --output_dir "$out/rivals"
