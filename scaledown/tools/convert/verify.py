"""Compares a converted model with the published class, which runs in a Python of its own."""

import json
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from errors_scaledown import ScaleDownError
from modeling_scaledown import ScaleDownModel

from .source import Source, read_safetensors

# Documents of different lengths, and one that is cut.
QUESTIONS = ["Who wrote the novel Ivanhoe?", "Where does the Loire rise, and how long is it?"]
DOCUMENTS = [
    [
        "Ivanhoe is a historical novel by Walter Scott, published in three volumes in 1819.",
        "The Talisman is another of his novels, set in Palestine during the Third Crusade.",
    ],
    ["The Loire rises in the Cévennes and is 1,006 kilometres long. " * 12, "Herons are long-legged birds."],
]
MAX_NEW_TOKENS = 32
# Of 32 bits on different releases of torch, relative to the largest number.
TOLERANCE = 1e-3


def compare(model: ScaleDownModel, source: Source, python: str) -> str:
    """Compare memory embeddings and answers with those of the published class.

    Args:
        model: The converted model; it is taken to 32 bits.
        source: The checkpoint it was made of.
        python: The interpreter that runs the class.

    Returns:
        What was compared.

    Raises:
        ScaleDownError: The class cannot be run there, or gives something else.
    """
    memory, answers = published(source, python, reads_question(model))
    rounded = (
        "" if model.dtype == torch.float32 else f" It was converted in {model.dtype}; compare with --dtype float32."
    )
    model = model.float()
    flat = [document for row in DOCUMENTS for document in row]
    asked = [question for question, row in zip(QUESTIONS, DOCUMENTS, strict=True) for _ in row]
    compressed = model.compress(asked, [[document] for document in flat]).memory_embeddings.cpu()
    own = model.answer(QUESTIONS, DOCUMENTS, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    compressed = compressed[:, : model.config.num_memory_tokens]  # a separator is none of the class's
    if compressed.shape != memory.shape:
        raise ScaleDownError(
            f"The published class makes memory embeddings of shape {tuple(memory.shape)} of {len(flat)} documents, the "
            f"converted model of {tuple(compressed.shape)}."
        )
    difference = float((compressed - memory).abs().max() / memory.abs().max().clamp(min=1e-9))
    same = [a.strip() == b.strip() for a, b in zip(own, answers, strict=True)]
    figures = (
        f"largest difference between memory embeddings, relative to the largest number: {difference:.1e}; "
        f"{sum(same)} of {len(same)} answers are the same"
    )
    if difference > TOLERANCE or not all(same):
        places = [i for i, equal in enumerate(same) if not equal]
        shown = "".join(f"\n  published: {answers[i]!r}\n  converted: {own[i]!r}" for i in places)
        raise ScaleDownError(f"The converted model is not the published one: {figures}.{rounded}{shown}")
    return f"Compared with the published class: {figures}."


def reads_question(model: ScaleDownModel) -> bool:
    """Whether a converted model's compressor reads the question."""
    prompt = model.config.compressor_prompt
    return prompt is None or "{question}" in prompt


def published(source: Source, python: str, with_questions: bool) -> tuple[torch.Tensor, list[str]]:
    """Memory embeddings `(documents, slots, hidden)` and answers of the published class."""
    if shutil.which(python) is None:
        raise ScaleDownError(f"--verify names {python}, which is no Python that can be started.")
    local = source.commit is None
    with tempfile.TemporaryDirectory() as folder:
        request = Path(folder) / "request.json"
        fields = {
            "source": str(source.folder.resolve()) if local else source.name,
            "revision": source.commit,
            "questions": QUESTIONS,
            "documents": DOCUMENTS,
            "reads_question": with_questions,
            "max_new_tokens": MAX_NEW_TOKENS,
        }
        request.write_text(json.dumps(fields), encoding="utf-8")
        script = Path(__file__).with_name("run_published.py")
        done = subprocess.run([python, "-I", str(script), str(request)], cwd=folder, capture_output=True, text=True)
        if done.returncode != 0:
            raise ScaleDownError(
                f"The published class could not be run by {python}:\n{done.stderr.strip()[-1500:]}\nIt needs packages "
                "of its time, often a GPU and bfloat16; see docs/converting.md."
            )
        memory = read_safetensors(Path(folder) / "memory.safetensors")["memory"]
        return memory.flatten(0, -3), json.loads((Path(folder) / "answers.json").read_text(encoding="utf-8"))
