"""Runs a published model's own class on a few documents. Run as a script by another Python; imports nothing of ours.

Reads a request as JSON from the file named first, and writes answers beside it and memory embeddings as safetensors.
"""

import inspect
import json
import sys
from pathlib import Path


def accepted(function, **arguments):
    """Those of the arguments that a function has."""
    names = inspect.signature(function).parameters
    return {name: value for name, value in arguments.items() if name in names}


def load(name, revision):
    """The model by its own code, in 32 bits; attention without extra packages, where the code lets us choose."""
    from transformers import AutoModel

    settings = {"trust_remote_code": True}
    if revision is not None:
        settings["revision"] = settings["code_revision"] = revision
    try:
        model = AutoModel.from_pretrained(name, attn_implementation="eager", **settings)
    except TypeError:
        model = AutoModel.from_pretrained(name, **settings)
    return model.float().eval()


def main():
    """Read the request, answer it."""
    import torch
    from safetensors.torch import save_file

    folder = Path(sys.argv[1]).parent
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    model = load(request["source"], request["revision"])
    with torch.no_grad():
        questions, documents = request["questions"], request["documents"]
        flat = [document for row in documents for document in row]
        asked = [question for question, row in zip(questions, documents) for _ in row]  # noqa: B905
        settings = {"questions": asked} if request["reads_question"] else {}
        missing = settings.keys() - accepted(model.compress_documents, **settings).keys()
        if missing:
            raise TypeError("compress_documents of this class takes no questions")
        memory = model.compress_documents(documents=flat, **settings)
        answers = model.generate_from_text(
            questions=questions, documents=documents, max_new_tokens=request["max_new_tokens"]
        )
    save_file({"memory": memory.float().cpu().contiguous()}, str(folder / "memory.safetensors"))
    (folder / "answers.json").write_text(json.dumps(list(answers)), encoding="utf-8")


if __name__ == "__main__":
    main()
