"""The way from the settings of a run to its model: built from backbones, or loaded from a checkpoint."""

from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from errors_scaledown import ScaleDownError
from modeling_scaledown import ScaleDownModel

from ..common.adapters import start_lora_from
from ..common.command_line import settings_checked_by_libraries, split_names
from ..common.loading import load_model
from .arguments import ModelArguments, ScaleDownTrainingArguments

CONFIG_ARGUMENTS = (
    "compressor_type",
    "num_compressor_layers",
    "num_memory_tokens",
    "compression_rate",
    "slot_pooling",
    "pointer_window",
    "pointer_loss_weight",
    "chunk_length",
    "max_query_length",
    "enable_reranking",
    "max_documents",
    "reranking_loss_weight",
    "projector_hidden_size",
    "system_prompt",
    "weights_format",
)
# What may change when a trained model is trained further; the others are built into its weights.
CHANGEABLE = (
    *("compression_rate", "max_query_length", "max_documents", "reranking_loss_weight", "pointer_loss_weight"),
    *("system_prompt", "weights_format"),
)
# A reader gets an adapter of its own, and nothing reads what the stage pointer's compressor writes.
STAGES_WITHOUT_LORA = ("reader", "pointer")
LORA_ARGUMENTS = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
}


def build_model(
    model_args: ModelArguments,
    args: ScaleDownTrainingArguments,
    with_generator: bool = True,
    with_backbone: bool = True,
) -> ScaleDownModel:
    """Build or load the model, or a part of it, in the type the run computes in.

    Args:
        model_args: Backbones or checkpoint, and settings.
        args: Decide device and type.
        with_generator: Whether the generator is needed, with LoRA.
        with_backbone: Whether the compressor's backbone is.

    Returns:
        The model, its generator frozen but for LoRA.

    Raises:
        ValueError: Settings that contradict each other.
    """
    quantization = {"load_in_4bit": model_args.load_in_4bit, "load_in_8bit": model_args.load_in_8bit}
    quantized = with_generator and any(quantization.values())
    loading = {"dtype": args.generator_dtype, "with_generator": with_generator, "with_backbone": with_backbone}
    if model_args.attn_implementation:
        loading["attn_implementation"] = model_args.attn_implementation
    if quantized:
        loading.update(quantization)
        # A quantized generator cannot be moved afterwards, so it is loaded where it will run.
        loading["device_map"] = {"": args.device.index or 0} if args.device.type == "cuda" else None
    settings = config_settings(model_args, args.stage)
    check_exist(model_args)
    unset_hf_deepspeed_config()  # so that weights are spread when all are there: LoRA and memory embeddings read them
    if model_args.model_name_or_path is not None:
        changes = {name: settings[name] for name in CHANGEABLE if name in settings and name != "weights_format"}
        name, revision = model_args.model_name_or_path, model_args.revision
        load = partial(ScaleDownModel.from_pretrained, name, revision=revision, **changes, **loading)
        model = load_model(load, name, "--model_name_or_path")
        model.config.weights_format = settings.get("weights_format", model.config.weights_format)
        model.config.check()
        check_settings(settings, model.config, model_args.model_name_or_path)
        if model.config.weights_format == "delta" and not model.config.generator_fingerprint:
            raise ScaleDownError(
                f"weights_format=delta needs a generator that is still the one of its repository, and that of "
                f"{model_args.model_name_or_path} is not: its LoRA was merged into it. Train with weights_format=full, "
                "or go on from a model that was trained with merge_lora=false."
            )
    else:
        settings["slot_pooling"] = choose_slot_pooling(model_args, args)
        model = _from_backbones(model_args, {**settings, **loading})
    check_stage(model.config, args.stage)
    keep_token_embeddings(model, model_args)
    if with_generator and args.stage not in STAGES_WITHOUT_LORA:
        add_lora(model, model_args)
    if args.deepspeed_plugin is not None:
        args.deepspeed_plugin.set_deepspeed_weakref()
    return model


def _from_backbones(model_args: ModelArguments, settings: dict[str, Any]) -> ScaleDownModel:
    try:
        return ScaleDownModel.from_backbones(
            model_args.generator_name_or_path,
            model_args.compressor_name_or_path,
            revision=model_args.generator_revision,
            compressor_revision=model_args.compressor_revision,
            gguf_file=model_args.generator_gguf_file,
            compressor_gguf_file=model_args.compressor_gguf_file,
            **settings,
        )
    except ScaleDownError:
        raise
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        names = [("generator", model_args.generator_name_or_path), ("compressor", model_args.compressor_name_or_path)]
        named = " and ".join(f"{part}_name_or_path={name}" for part, name in names if name is not None)
        raise ScaleDownError(
            f"{named} cannot be loaded ({type(error).__name__}: {error}). Expected folders or names on the Hub; check "
            "the names, their kind and the connection."
        ) from error


def config_settings(model_args: ModelArguments, stage: str) -> dict[str, Any]:
    """The fields of the configuration that were asked for, but for those of what a stage does not have.

    Args:
        model_args: Holds them.
        stage: The stage.

    Returns:
        Those that are set.
    """
    settings = {name: getattr(model_args, name) for name in CONFIG_ARGUMENTS}
    settings = {name: value for name, value in settings.items() if value is not None}
    if stage != "reader":
        return settings
    # A reader has no compressor; the smallest stands in for it.
    of_generator = {name: value for name, value in settings.items() if name == "system_prompt"}
    return {**of_generator, "num_compressor_layers": 1}


def check_stage(config: Any, stage: str) -> None:
    """Check that a model is one that a stage can teach.

    Args:
        config: The model's configuration.
        stage: The stage.

    Raises:
        ScaleDownError: The stage pointer is to teach slots that do not point.
    """
    if stage == "pointer" and config.slot_pooling != "pointer":
        raise ScaleDownError(
            f"stage=pointer teaches where to point, and slot_pooling={config.slot_pooling} does not; set "
            "slot_pooling=pointer, or choose another stage."
        )


def keep_token_embeddings(model: ScaleDownModel, model_args: ModelArguments) -> None:
    """Keep the token embeddings of the compressor's backbone from learning, where that is asked for.

    Args:
        model: The model; it is changed.
        model_args: Say whether they learn.
    """
    if model.compressor.backbone is not None and not model_args.train_token_embeddings:
        model.compressor.backbone.get_input_embeddings().requires_grad_(False)


def check_exist(model_args: ModelArguments) -> None:
    """Check that models meant as folders are there, before anybody's of that name is looked up on the Hub.

    Args:
        model_args: Names them.

    Raises:
        FileNotFoundError: One of them can only be a folder, and there is none.
    """
    for option in ("model_name_or_path", "generator_name_or_path", "compressor_name_or_path", "lora_name_or_path"):
        name = getattr(model_args, option) or ""
        # A name on the Hub is `name` or `owner/name`, and of a GGUF file `owner/name/file.gguf`.
        is_file = name.endswith(".gguf")
        meant = name.startswith(("runs/", ".", "/", "~")) or name.count("/") > 1 + is_file
        if meant and not (Path(name).is_file() if is_file else Path(name).is_dir()):
            made = "run the recipe that makes it first, or " if name.startswith("runs/") else ""
            raise FileNotFoundError(
                f"{option}={name} is not a {'file' if is_file else 'folder'} (looked from {Path.cwd()}); {made}name "
                "another. A dry run needs it too: it reads configuration and tokenizer."
            )


def check_settings(settings: dict[str, Any], config: Any, name_or_path: str) -> None:
    """Check that a trained model has the settings asked for.

    Args:
        settings: Fields of the configuration.
        config: The model's configuration.
        name_or_path: The model's, for the message.

    Raises:
        ValueError: It has others.
    """
    for name, value in settings.items():
        if value != getattr(config, name):
            raise ScaleDownError(
                f"{name}={value} cannot be changed in a trained model: {name_or_path} has {getattr(config, name)}. "
                "Leave it out, or start from backbones."
            )


def add_lora(model: ScaleDownModel, model_args: ModelArguments) -> None:
    """Add the LoRA layers asked for, or check that those a trained model has are they.

    Args:
        model: The model; it is changed.
        model_args: The settings of LoRA.

    Raises:
        ValueError: The model has LoRA layers with other settings.
    """
    settings = lora_settings(model_args)
    if settings.get("r") == 0:
        return
    if model_args.lora_name_or_path is not None:
        start_lora_from(model, model_args.lora_name_or_path)
    if model.config.lora_config is None:
        with settings_checked_by_libraries("The LoRA layers cannot be made"):
            model.add_lora(**settings)
        return
    for key, value in settings.items():
        if value != model.config.lora_config.get(key):
            raise ScaleDownError(
                f"The model's LoRA has {key}={model.config.lora_config.get(key)}, not {value}. Leave the option out, "
                "or merge its LoRA first (model.merge_lora(), then save) to begin a new one."
            )


def lora_settings(model_args: ModelArguments) -> dict[str, Any]:
    """The settings of LoRA that were asked for, by the names of `peft.LoraConfig`.

    Args:
        model_args: Holds them.

    Returns:
        Those that are set.
    """
    settings = {key: getattr(model_args, name) for name, key in LORA_ARGUMENTS.items()}
    settings = {key: value for key, value in settings.items() if value is not None}
    if "target_modules" in settings:
        settings["target_modules"] = _target_modules(settings["target_modules"])
    return settings


def choose_slot_pooling(model_args: ModelArguments, args: ScaleDownTrainingArguments) -> str:
    """Say what the slots of a model from backbones are: what was asked for, or what the stage can train.

    Args:
        model_args: May name a `slot_pooling`.
        args: Its `stage` decides.

    Returns:
        A value of the configuration's `slot_pooling`.

    Raises:
        ValueError: The stage cannot train what was asked for.
    """
    frozen = args.stage in ("compress", "generate")
    if frozen and model_args.slot_pooling not in (None, "span_mean"):
        raise ScaleDownError(
            f"slot_pooling={model_args.slot_pooling} in two-stage training from backbones would cache what random "
            "memory or reranking embeddings give, and never train them. Leave it out (span_mean), or start from a "
            "trained model (model_name_or_path)."
        )
    return model_args.slot_pooling or ("span_mean" if frozen else "memory_tokens")


def _target_modules(names: str) -> str | list[str]:
    """peft takes `all-linear` as it is, names as a list; any other string it would read as a regular expression."""
    return names if names == "all-linear" else split_names(names)
