"""Try the installed package away from its sources: `make test-wheel` runs this in an environment of its own.

    python -P tests/installed_package.py CHECKOUT

Needs no network; the model is the one that is embedded in the checkout.
"""

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

from transformers import AutoModel

import scaledown

QUESTION, ANSWER = "What did Silver Otter carry?", "timber"
DOCUMENTS = [
    "Silver Heron was a ship. The hold of Silver Heron was filled with wool. It was commanded by Fima Piler.",
    "Silver Otter was a ship. It was launched on 4 June 1893. Its captain was Mito Fiswick. The ship carried timber.",
]


def check(holds: bool, what: str) -> None:
    """Stop unless something holds."""
    if not holds:
        sys.exit(f"not so: {what}")


def main() -> None:
    """Imports, commands, and a model that is loaded, saved and loaded again."""
    checkout = Path(sys.argv[1]).resolve()
    check(checkout / "scaledown" not in Path(scaledown.__file__).parents, "scaledown is the installed package")
    library = importlib.util.find_spec("evaluate")
    check(library is None or library.submodule_search_locations is not None, "evaluate is the library")
    for script in ("train", "prepare_data", "benchmark", "app"):
        check(importlib.util.find_spec(script) is None, f"{script}.py is not installed")
    for command in ("train", "evaluate", "prepare-data", "benchmark", "app"):
        path = Path(sys.executable).with_name(f"scaledown-{command}")
        help_text = subprocess.run([path, "--help"], capture_output=True, text=True, check=True).stdout
        check(help_text.startswith(f"usage: {path.name} "), f"{path.name} --help")

    travelled = AutoModel.from_pretrained(checkout, trust_remote_code=True)
    check(travelled.answer(QUESTION, DOCUMENTS, max_new_tokens=8) == ANSWER, "the embedded model answers")
    installed = scaledown.ScaleDownModel.from_pretrained(checkout)
    with tempfile.TemporaryDirectory() as folder:
        installed.save_pretrained(folder)
        check("A ScaleDown model" in Path(folder, "README.md").read_text(encoding="utf-8"), "a card is written")
        again = AutoModel.from_pretrained(folder, trust_remote_code=True)
        check(again.answer(QUESTION, DOCUMENTS, max_new_tokens=8) == ANSWER, "the saved model answers")
    print(f"scaledown {scaledown.__version__} works from {Path(scaledown.__file__).parent}")


if __name__ == "__main__":
    main()
