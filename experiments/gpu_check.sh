#!/usr/bin/env bash
# The GPU half of the tests, with the versions that are there: about two minutes. GPU_TESTS_ON=cpu tries them on a CPU.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
"$python" -c "import torch, transformers, peft; print('torch', torch.__version__, 'transformers', transformers.__version__, \
'peft', peft.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU')"
exec "$python" -m pytest tests/model/test_gpu.py -m gpu -n "${WORKERS:-6}" -q --durations 8 "$@"
