"""Backbones on disk and comparisons of whole models, shared by the tests of saving and loading."""

import contextlib
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForCausalLM

from scaledown import ScaleDownModel
from tiny import DOCUMENTS, ENCODERS, GENERATORS, QUESTIONS, SHAPE, build_tokenizer

ROOT = Path(__file__).resolve().parents[1]
# The files of code that are saved with a model.
CODE = {path.name for path in ROOT.glob("*_scaledown.py")}
# A function for scripts that run in a process of their own, which must know nothing of this repository. The virtual
# environment may lie in the checkout; what is installed in it is no part of the project.
ISOLATION_CHECK = f"""
def check_isolated():
    files = {{name: getattr(module, "__file__", None) or "" for name, module in list(sys.modules.items())}}
    for name, path in [*((path, path) for path in sys.path), *files.items()]:
        assert "site-packages" in path or not (path + "/").startswith({str(ROOT)!r} + "/"), name
"""
# Fields of ScaleDownConfig: chunks of 32 tokens become 4 slots.
SETTINGS = {
    "num_compressor_layers": 1,
    "num_memory_tokens": 4,
    "compression_rate": 8,
    "chunk_length": 32,
    "max_query_length": 24,
    "projector_hidden_size": 40,
    "system_prompt": "Answer.",
}
# Options of train.py for the same, with a small LoRA.
TRAINING_SETTINGS = {**SETTINGS, "lora_r": 4, "lora_dropout": 0.0}


def save_generator(
    folder: Path, kind: str = "llama", seed: int = 1, dtype: torch.dtype = torch.float32, shards: str = "5GB", **changes
) -> Path:
    """A random language model with its tokenizer; `changes` are fields of its configuration."""
    config = GENERATORS[kind](**changes)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    model.generation_config.pad_token_id = SHAPE["pad_token_id"]
    model.save_pretrained(folder, max_shard_size=shards)
    build_tokenizer().save_pretrained(folder)
    return folder


def save_encoder(folder: Path, kind: str = "modernbert", seed: int = 2) -> Path:
    """A random encoder with its tokenizer."""
    torch.manual_seed(seed)
    AutoModel.from_config(ENCODERS[kind]()).save_pretrained(folder)
    build_tokenizer(pair=True).save_pretrained(folder)
    return folder


def save_small_llm(folder: Path, seed: int = 3) -> Path:
    """A random language model, narrower than the generators."""
    return save_generator(folder, "llama", seed, hidden_size=24, num_hidden_layers=2, head_dim=6)


def put_in_cache(cache: Path, name: str, folder: Path, only: str = "*") -> Path:
    """Files of a folder as a cache of the Hub has them that were downloaded from a repository."""
    place, commit = cache / f"models--{name.replace('/', '--')}", "0" * 40
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit, encoding="utf-8")
    (place / "snapshots" / commit).mkdir(parents=True)
    for path in folder.glob(only):
        shutil.copyfile(path, place / "snapshots" / commit / path.name)
    return cache


def save_backbones(folder: Path) -> dict[str, tuple[Path, Path | None]]:
    """Generator and compressor for each kind of compressor."""
    generator = save_generator(folder / "generator")
    return {
        "n_layers": (generator, None),
        "modernbert": (generator, save_encoder(folder / "encoder")),
        "llm": (generator, save_small_llm(folder / "llm")),
    }


def from_backbones(backbones: tuple[Path, Path | None], **kwargs) -> ScaleDownModel:
    """Model of the kind the backbones' names imply."""
    generator, compressor = backbones
    if compressor is not None:
        kwargs.setdefault("compressor_type", "llm" if compressor.name == "llm" else "modernbert")
    return ScaleDownModel.from_backbones(
        str(generator), str(compressor) if compressor is not None else None, **{**SETTINGS, **kwargs}
    )


@torch.no_grad()
def outputs(model: ScaleDownModel) -> dict[str, torch.Tensor]:
    """What a model makes of the questions and documents of `tiny`."""
    out = model(**model.processor(QUESTIONS, DOCUMENTS).to(model.device))
    return {"logits": out.logits, "memory_embeddings": out.memory_embeddings, "scores": out.reranking_scores}


def assert_same_outputs(model: ScaleDownModel, expected: dict[str, torch.Tensor]):
    """Bit for bit."""
    for name, value in outputs(model).items():
        assert value.dtype == expected[name].dtype
        assert torch.equal(value, expected[name]), f"{name}: {(value - expected[name]).abs().max()}"


@contextlib.contextmanager
def silence():
    """Fails when anything, transformers' load report included, logs a warning."""
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    loggers = [logging.getLogger(), logging.getLogger("transformers")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    assert not records, [record.getMessage() for record in records]


def load_silently(folder: Path, **kwargs) -> ScaleDownModel:
    """Loads a model and fails when anything was missing, left over, of another shape, or worth a warning."""
    with silence():
        model, info = ScaleDownModel.from_pretrained(str(folder), output_loading_info=True, **kwargs)
    assert not any(info.values()), {name: value for name, value in info.items() if value}
    return model


def files(folder: Path) -> set[str]:
    """Paths of all files, relative to the folder."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def write_rows(path: Path, rows: list[dict]) -> Path:
    """Records as a file has them: a line each, without what is `None`."""
    present = [{key: value for key, value in row.items() if value is not None} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in present), encoding="utf-8")
    return path


def options(settings: dict) -> list[str]:
    """Settings as a command line has them; those that are `None` are left out."""
    return [part for name, value in settings.items() if value is not None for part in (f"--{name}", str(value))]


def train_with_two_processes(arguments: dict, folder: Path):
    """Runs train.py in two CPU processes; fails with what they wrote last."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "train.py"), *options(arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
