"""Measure a ScaleDown model: answers, reranking, tokens and time, beside the same generator on whole documents.

    python evaluate.py --model runs/mistral --data dev.jsonl
    python evaluate.py --model runs/mistral --data dev-v1.1.json --limit 500 --baselines full_text,no_documents
    python evaluate.py --compare runs/evaluation/a runs/evaluation/b

docs/evaluation.md explains what is measured; `python evaluate.py --help` lists every option.

The library `evaluate` of Hugging Face has this file's name: imported rather than run, the file hands over to it.
"""

import sys

if __name__ == "__main__":
    from scaledown.commands import evaluate

    sys.exit(evaluate())
elif __name__ == "evaluate":
    import importlib.machinery
    import importlib.util
    from pathlib import Path

    here = Path(__file__).resolve().parent
    elsewhere = [folder for folder in sys.path if Path(folder or ".").resolve() != here]
    spec = importlib.machinery.PathFinder.find_spec("evaluate", elsewhere)
    if spec is None:
        raise ModuleNotFoundError("The library evaluate is missing; install it with `pip install evaluate`.")
    library = importlib.util.module_from_spec(spec)
    sys.modules["evaluate"] = library  # what the import statement that led here returns
    spec.loader.exec_module(library)
