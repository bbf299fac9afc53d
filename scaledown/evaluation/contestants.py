"""The model to evaluate, and the generator it is compared with."""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from errors_scaledown import ScaleDownError
from gguf_scaledown import split_gguf
from modeling_scaledown import ScaleDownModel
from quantization_scaledown import is_quantized
from weights_scaledown import load_complete

from ..common.adapters import merge_adapter, without_lora
from ..common.choices import MEMORY_BASELINES, SELECTED_TEXT, TEXT_BASELINES
from ..common.devices import pick_dtype
from ..common.loading import load_model
from .arguments import EvaluationArguments
from .data import Example
from .systems import CompressedSystem, SelectedTextSystem, System, TextSystem, choose_donors, selection_of

# What --generator takes for the model's own, whatever was merged into it.
OWN_GENERATOR = "own"


@dataclass
class Contestants:
    """The model, the generator without it, and what a reader of the results must know about both.

    Args:
        model: The model, its LoRA merged where that is possible.
        generator: Reads the text of the baselines; None where no baseline reads text.
        adapters_off: Whether the generator has LoRA layers to be passed over.
        notes: Sentences for the report.
        description: What the model is.
    """

    model: ScaleDownModel
    generator: PreTrainedModel | None = None
    adapters_off: bool = False
    notes: list[str] = field(default_factory=list)
    description: dict[str, Any] = field(default_factory=dict)


def load_contestants(arguments: EvaluationArguments, device: torch.device) -> Contestants:
    """Load the model and the generator of the baselines.

    The baselines' generator is the one without our LoRA: a copy made before the LoRA is merged, or the one that
    `--generator` names.

    Args:
        arguments: Names them.
        device: Where they go.

    Returns:
        Both.

    Raises:
        ValueError: One of them cannot be loaded, the generator has another vocabulary than the model, documents are to
            be selected by a model that does not rank, or nothing says which for a baseline that reads them.
    """
    dtype = torch.float32 if arguments.dtype == "auto" and device.type == "cpu" else pick_dtype(arguments.dtype)
    settings: dict[str, Any] = {"dtype": dtype}
    if arguments.load_in_4bit:
        settings |= {"load_in_4bit": True, "device_map": {"": str(device)}}
    model = load_model(
        lambda: ScaleDownModel.from_pretrained(arguments.model, revision=arguments.revision, **settings),
        arguments.model,
        "--model",
    )
    model = (model if arguments.load_in_4bit else model.to(device)).eval()
    config = model.config
    if arguments.selection and not config.enable_reranking:
        raise ScaleDownError(
            f"{arguments.model} was built without reranking and cannot select documents; leave out "
            f"{', '.join(f'--{name}' for name in arguments.selection)}."
        )
    selection = selection_of(config, arguments.selection)
    if SELECTED_TEXT in arguments.baseline_names and not selection:
        raise ScaleDownError(
            f"the baseline {SELECTED_TEXT} reads the documents that the model's scores select, and neither the model "
            "nor an option says which; pass --max_documents, --max_slots or --min_reranking_score, or leave it out."
        )
    found = Contestants(model)
    if config.enable_reranking and config.reranking_trained is False:
        found.notes.append("The model's reranking head is untrained; its scores order documents at random.")
    found.description = {
        "name": arguments.model if not Path(arguments.model).exists() else Path(arguments.model).resolve().name,
        "revision": arguments.revision,
        "compressor_type": config.compressor_type,
        "num_memory_tokens": config.num_memory_tokens,
        "compression_rate": arguments.compression_rate or config.compression_rate,
        "num_parameters": model.num_parameters(),
        "selection": selection,
        "lora": config.lora_config is not None,
        "dtype": str(dtype).removeprefix("torch."),
    }
    if selection:
        limits = ", ".join(f"{name}={value}" for name, value in selection.items())
        found.notes.append(f"From slots, the generator read the documents the model's scores select: {limits}.")
    if set(arguments.baseline_names) & set(TEXT_BASELINES):
        _find_generator(found, arguments, device, dtype)
        if arguments.reader is not None:
            _make_reader(found, arguments.reader)
    if config.lora_config is not None:
        if is_quantized(model.generator):
            found.notes.append("The quantized generator keeps its LoRA unmerged, which makes the model slower.")
        else:
            model.merge_lora()
            found.notes.append("The model's LoRA was merged before anything was timed.")
    return found


def build_systems(found: Contestants, arguments: EvaluationArguments, examples: list[Example]) -> list[System]:
    """Set up the model and the baselines.

    Args:
        found: The model and the generator.
        arguments: The baselines, and how to answer.
        examples: All questions, among which documents are shuffled.

    Returns:
        The model first, then the baselines in the order asked for.

    Raises:
        ValueError: Documents cannot be shuffled.
    """
    model = found.model
    common = (arguments.compression_rate, arguments.max_new_tokens)
    systems: list[System] = [CompressedSystem(model, *common, selection=arguments.selection)]
    for name in arguments.baseline_names:
        if name in MEMORY_BASELINES:
            memory = "random" if name == "random_memory" else "own"
            donors = choose_donors(examples, arguments.seed) if name == "shuffled_documents" else None
            kind = (arguments.seed, memory, donors, name, arguments.selection)
            systems.append(CompressedSystem(model, *common, *kind))
        else:
            text = (found.generator, model.processor, model.generation_config, *common, found.adapters_off)
            if name == SELECTED_TEXT:
                systems.append(SelectedTextSystem(systems[0], *text))
            else:
                systems.append(TextSystem(name, *text))
    return systems


def check_lengths(
    systems: list[System], examples: list[Example], limit: int | None, max_new_tokens: int
) -> dict[str, list[tuple[int, int]]]:
    """Find the questions whose prompt, with the answer, exceeds the generator's context.

    Args:
        systems: What will answer.
        examples: The questions.
        limit: Positions of the generator; None where it has no limit.
        max_new_tokens: Length of an answer at most.

    Returns:
        For each system with such questions, their indices and the tokens of their prompts.
    """
    if limit is None:
        return {}
    found: dict[str, list[tuple[int, int]]] = {}
    for system in systems:
        for start in range(0, len(examples), 64):
            part = examples[start : start + 64]
            for example, length in zip(part, system.prompt_lengths(part), strict=True):
                if length + max_new_tokens > limit:
                    found.setdefault(system.name, []).append((example.index, length))
    return found


def _find_generator(
    found: Contestants, arguments: EvaluationArguments, device: torch.device, dtype: torch.dtype
) -> None:
    model, config = found.model, found.model.config
    original = config.generator_name_or_path
    where = {"revision": config.generator_revision, "gguf_file": config.generator_gguf_file}
    merged = config.lora_config is None and config.generator_fingerprint is None
    if arguments.generator not in (None, OWN_GENERATOR):
        named = {"revision": arguments.generator_revision}
        found.generator = _load_generator(found, arguments.generator, named, device, dtype)
    elif merged:
        # A merged LoRA has learned to read slots, which may have cost it some of its skill at reading text.
        failure = "it is not known where it came from"
        if arguments.load_in_4bit:
            failure = "with --load_in_4bit no second one is loaded"
        elif original is not None and arguments.generator is None:
            try:
                found.generator = _load_generator(found, original, where, device, dtype)
                return
            except ScaleDownError as error:
                failure = f"the original could not be used: {error}"
        elif arguments.generator == OWN_GENERATOR:
            failure = "as --generator own asks"
        found.generator = model.generator
        found.notes.append(
            "The baselines read text with the model's own generator, which may hold a merged LoRA "
            f"({failure.rstrip('.')}); --generator names another."
        )
    elif config.lora_config is None:
        found.generator = model.generator
        found.notes.append("The baselines read text with the model's own generator, which has no LoRA.")
    elif is_quantized(model.generator):
        found.generator, found.adapters_off = model.generator, True
        found.notes.append("The baselines read text with the quantized generator, its LoRA passed over.")
    else:
        found.generator = without_lora(model.generator)
        found.notes.append("The baselines read text with the generator without the model's LoRA.")


def _make_reader(found: Contestants, adapter: str) -> None:
    """Put a reader's LoRA into the generator of the baselines, which must not be the model's own with its LoRA."""
    if found.generator is found.model.generator:
        quantized = is_quantized(found.model.generator)
        if quantized or found.model.config.generator_fingerprint is None:
            raise ScaleDownError(
                f"--reader {adapter} needs the generator as it was before training, and the model's own is "
                f"{'quantized' if quantized else 'changed'}; name the original with --generator."
            )
        found.generator = copy.deepcopy(found.generator)
    found.generator = merge_adapter(found.generator, adapter)
    found.notes[-1] = (
        f"The baselines read text with the reader {Path(adapter).resolve().name}: the generator with a LoRA that was "
        "trained on whole documents."
    )


def _load_generator(
    found: Contestants, source: str, where: dict[str, str | None], device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:
    source, gguf_file = split_gguf(source, where.get("gguf_file"))
    named = {"revision": where["revision"] or "main", "gguf_file": gguf_file}
    generator = load_model(
        lambda: load_complete(AutoModelForCausalLM, source, dtype=dtype, **named), source, "--generator"
    )
    own = found.model.processor.tokenizer
    other = load_model(lambda: AutoTokenizer.from_pretrained(source, **named), source, "--generator")
    if other.get_vocab() != own.get_vocab():
        raise ScaleDownError(
            f"--generator names {source}, whose tokenizer has another vocabulary ({len(other)} tokens) than the "
            f"model's ({len(own)}); name the generator the model was trained with."
        )
    name = Path(source).resolve().name if Path(source).exists() else source
    revision = f" at {where['revision']}" if where["revision"] else ""
    found.notes.append(f"The baselines read text with {name}{revision}.")
    return generator.to(device).eval()
