"""Records, arguments and trainers for tests of training: small, on a CPU, without progress bars."""

import torch

from folders import TRAINING_SETTINGS
from scaledown.training.arguments import ModelArguments, ScaleDownTrainingArguments
from scaledown.training.collators import JointCollator
from scaledown.training.trainer import ScaleDownTrainer
from tiny import (
    ANSWERS,
    DOCUMENTS,
    QUESTIONS,
)

SCORES = [[2.0, -1.0], None, [0.5, 1.0, -3.0]]


def rows(repeat: int = 1) -> list[dict]:
    listed = zip(QUESTIONS, DOCUMENTS, ANSWERS, SCORES, strict=True)
    return [{"query": q, "documents": d, "answer": [a], "reranking_scores": s} for q, d, a, s in list(listed) * repeat]


def training_arguments(output_dir, **settings) -> ScaleDownTrainingArguments:
    defaults = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "compressor_learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return ScaleDownTrainingArguments(output_dir=str(output_dir), **{**defaults, **settings})


def build_trainer(model, output_dir, data=None, **settings) -> ScaleDownTrainer:
    return ScaleDownTrainer(
        model=model,
        args=training_arguments(output_dir, **settings),
        train_dataset=rows() if data is None else data,
        data_collator=JointCollator(model.processor),
        processing_class=model.processor,
    )


def model_arguments(backbones, compressor_type="n_layers", **settings) -> ModelArguments:
    defaults = {
        "generator_name_or_path": str(backbones / "generator"),
        "compressor_name_or_path": None if compressor_type == "n_layers" else str(backbones / "encoder"),
        "compressor_type": compressor_type,
    }
    return ModelArguments(**{**TRAINING_SETTINGS, **defaults, **settings})


def parameters(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}
