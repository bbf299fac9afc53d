#!/usr/bin/env bash
# Minutes of one GPU for models/smollm2-135m-16x: gpu_smollm2.sh check|joint|reader --seconds N [options of gpu_smollm2.py].
# BASE is the generator as a folder or as a GGUF file.
set -euo pipefail
cd "$(dirname "$0")/.."
export TOKENIZERS_PARALLELISM=false PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3} base=${BASE:-runs/smollm2/base} data=${DATA:-runs/smollm2/data} output=${OUTPUT:-runs/smollm2/gpu}
if [[ $base == *.gguf ]]; then
    "$python" experiments/gguf_to_safetensors.py "$base" "${base%.gguf}"
    base=${base%.gguf}
fi
command=${1:?check, joint or reader}
shift
exec "$python" experiments/gpu_smollm2.py "$command" --base "$base" --data "$data" --output "$output" "$@"
