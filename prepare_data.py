"""Turn a question-answering data set into training records.

    python prepare_data.py --source train-v1.1.json --output squad.jsonl
    python prepare_data.py --source hotpotqa/hotpot_qa --config distractor --num_documents 10 --output hotpotqa.jsonl

`python prepare_data.py --help` lists every option.
"""

import sys

from scaledown.data_preparation import main

if __name__ == "__main__":
    sys.exit(main())
