"""The compressor of a published checkpoint, in the form that ScaleDown has for it."""

from dataclasses import dataclass, field
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from backbones_scaledown import check_compressor
from embeddings_scaledown import embeddings_name
from errors_scaledown import ScaleDownError
from families_scaledown import POSITIONS_AFTER_PADDING, truncated_config
from rows_scaledown import pair_frame
from weights_scaledown import load_complete

from .adapters import merge_adapter, read_adapter
from .decoder import Decoder, check_embeddings, check_rows, find_base, load_whole, one_of, take_prefixed, with_rows
from .layout import Layout
from .source import Source

FOLDER = "compressor"
WHOLE_FILE = f"{FOLDER}/compressor.pth"
FIRST_FILE = f"{FOLDER}/first_layer.pth"
ADAPTERS_FILE = f"{FOLDER}/compressor_adapters.pth"
MLP_FILE = f"{FOLDER}/mlp.pth"
TRIMMED_PREFIX = "custom_model."
# What two configurations of one architecture may differ in.
OF_NO_MATTER = dict.fromkeys(
    (
        "_name_or_path",
        "architectures",
        "dtype",
        "vocab_size",
        "transformers_version",
        "use_cache",
        "tie_word_embeddings",
    )
)
ASKED = "\nQuery:\n{question}Document:\n{document}"


@dataclass
class Compressor:
    """A compressor's backbone and all that ScaleDown must know of it.

    Args:
        backbone: The model, its vocabulary without memory tokens.
        tokenizer: What it reads with.
        table: Its embeddings, rows of memory tokens included.
        memory: Embeddings of the memory tokens `(num_slots, hidden)`.
        explained: Rows of the table that known and memory tokens take.
        projector: Weights of the projector by name; None without one.
        settings: Fields of the configuration.
    """

    backbone: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    table: torch.Tensor
    memory: torch.Tensor
    explained: int
    projector: dict[str, torch.Tensor] | None = None
    settings: dict[str, Any] = field(default_factory=dict)


@torch.no_grad()
def load_compressor(
    source: Source, layout: Layout, decoder: Decoder, base: str | None, revision: str | None, dtype: Any
) -> Compressor:
    """Make the compressor.

    Args:
        source: Weights; those of the compressor are taken out.
        layout: What its configuration says.
        decoder: The decoder.
        base, revision: Where the compressor's base model is, if elsewhere than the layout says.
        dtype: Type of the weights.

    Raises:
        ScaleDownError: The files do not go together, or ScaleDown has no equivalent.
    """
    if layout.compressor == "decoder":
        return copy_of_decoder(layout, decoder)
    name, config, hub = find_base(base or layout.compressor_base, revision)
    check_compressor(name, config)
    tokenizer = AutoTokenizer.from_pretrained(name, **hub)
    known = len(tokenizer)
    explained = known + layout.num_slots
    prefix = ""  # of names in a language model with its head, which a trimmed compressor is part of
    if layout.compressor == "trimmed":
        if not 1 <= layout.num_layers <= config.num_hidden_layers:
            raise ScaleDownError(
                f"compr_n_layers={layout.num_layers}, and {name} has {config.num_hidden_layers} layers."
            )
        config = truncated_config(config, layout.num_layers)
        prefix = f"{AutoModelForCausalLM._model_mapping[type(config)].base_model_prefix}."
    if layout.compressor_lora_r is not None:
        backbone = pretrained_backbone(layout, name, config, hub, dtype)
        check_embeddings(backbone.get_input_embeddings(), name)
        table = take_adapted(source, layout, backbone, prefix)
    else:
        backbone = AutoModel.from_config(config, dtype=dtype)
        check_embeddings(backbone.get_input_embeddings(), name)
        table = take_whole(source, layout, backbone, f"{TRIMMED_PREFIX}{prefix}" if prefix else "")
    check_rows(table, backbone.get_input_embeddings().weight, explained, "the compressor")
    with_rows(backbone, known)
    backbone.get_input_embeddings().weight.copy_(table[:known])
    projector = None
    if layout.mlp_size is not None:
        projector = source.take(MLP_FILE) or take_prefixed(source, "compr.mlp.")
        if projector.keys() != {"0.weight", "0.bias", "2.weight", "2.bias"}:
            raise ScaleDownError(f"{MLP_FILE} holds {', '.join(projector) or 'nothing'}, expected two linear layers.")
    memory = table[known:explained]
    settings = settings_of(layout, decoder, backbone, tokenizer)
    return Compressor(backbone, tokenizer, table, memory, explained, projector, settings)


def copy_of_decoder(layout: Layout, decoder: Decoder) -> Compressor:
    """The whole decoder as a compressor of its own, with the adapter that it compresses with merged."""
    tokens, known = layout.decoder_tokens, decoder.known
    config = truncated_config(decoder.model.config, decoder.model.config.num_hidden_layers)
    explained = known + len(tokens)
    check_rows(decoder.table, decoder.model.get_input_embeddings().weight, explained, "the decoder")
    config.vocab_size = explained
    weights = {key: tensor.clone() for key, tensor in decoder.model.base_model.state_dict().items()}
    adapter = decoder.adapters.get("encoder_adapter", decoder.adapters.get("decoder_adapter"))
    if adapter is not None:
        merge_adapter(weights, adapter, f"{decoder.model.base_model_prefix}.", "encoder_adapter")
    backbone = AutoModel.from_config(config, dtype=decoder.model.dtype)
    weights[embeddings_name(backbone)] = decoder.table[:explained].to(decoder.model.dtype)
    load_whole(backbone, weights, "the decoder")
    tokenizer = AutoTokenizer.from_pretrained(decoder.name, revision=decoder.revision, padding_side="left")
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    if tokenizer.convert_tokens_to_ids(tokens) != list(range(known, explained)):
        raise ScaleDownError(f"{decoder.name} has a tokenizer that knows one of {', '.join(tokens)} already.")
    rows = [decoder.row(tokens, token) for token in layout.slot_tokens]
    memory = torch.stack(rows if len(rows) > 1 else rows * layout.num_slots)
    frame = f"<ENC>{tokenizer.bos_token}{ASKED if layout.reads_question else '{document}'}{tokenizer.eos_token}"
    settings = {
        "compressor_type": "n_layers",
        "num_compressor_layers": config.num_hidden_layers,
        "keep_final_norm": True,
        "compressor_prompt": frame,
    }
    return Compressor(backbone, tokenizer, decoder.table, memory, explained, None, settings)


def pretrained_backbone(layout: Layout, name: str, config: Any, hub: dict, dtype: Any) -> PreTrainedModel:
    """The base model of a compressor that learned by LoRA; of a trimmed one, its first layers."""
    if layout.compressor == "separate":
        return load_complete(AutoModel, name, config=config, dtype=dtype, **hub)
    whole = load_complete(AutoModelForCausalLM, name, dtype=dtype, **hub).base_model.state_dict()
    backbone = AutoModel.from_config(config, dtype=dtype)
    names = backbone.state_dict().keys()
    load_whole(backbone, {key: tensor for key, tensor in whole.items() if key in names}, "the compressor")
    return backbone


def take_whole(source: Source, layout: Layout, backbone: PreTrainedModel, prefix: str) -> torch.Tensor:
    """Fill a compressor that was trained whole, and return its table."""
    state = source.take(WHOLE_FILE) or take_prefixed(source, "compr.model.")
    if not state:
        raise ScaleDownError(
            f"{source.name} has no {WHOLE_FILE}; the compressor was trained whole (lora_compressor=False)."
        )
    state = {key.removeprefix(prefix): value for key, value in state.items() if not key.endswith("lm_head.weight")}
    if not layout.keeps_norm:  # the class has none, and ScaleDown takes it off
        state.setdefault("norm.weight", torch.ones(backbone.config.hidden_size))
    embeddings = embeddings_name(backbone)
    table = state.get(embeddings)
    if table is None:
        raise ScaleDownError(f"{WHOLE_FILE} holds no {embeddings}.")
    with_rows(backbone, table.shape[0])
    load_whole(backbone, state, "the compressor")
    return table


def take_adapted(source: Source, layout: Layout, backbone: PreTrainedModel, prefix: str) -> torch.Tensor:
    """Merge a compressor's LoRA, and return its table."""
    first = source.take(FIRST_FILE)
    table = one_of(first, "embed_tokens.weight", FIRST_FILE)
    state = source.take(ADAPTERS_FILE)
    if table is None or not state:
        raise ScaleDownError(f"{source.name} has no {FIRST_FILE if table is None else ADAPTERS_FILE}.")
    weights = backbone.state_dict()
    adapter = read_adapter(state, layout.compressor_lora_r, ADAPTERS_FILE, first)
    merge_adapter(weights, adapter, prefix, ADAPTERS_FILE)
    backbone.load_state_dict(weights)
    return table


def settings_of(
    layout: Layout, decoder: Decoder, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Fields of the configuration for a compressor that is not the decoder."""
    kind, settings = backbone.config.model_type, {}
    if layout.compressor == "trimmed":
        own = truncated_config(decoder.model.config, min(layout.num_layers, decoder.model.config.num_hidden_layers))
        same = {**own.to_dict(), **OF_NO_MATTER} == {**backbone.config.to_dict(), **OF_NO_MATTER}
        settings["compressor_type"] = "n_layers" if same else "llm"
        settings["num_compressor_layers"] = layout.num_layers
        settings["compressor_prompt"] = ASKED if layout.reads_question else "{document}"
    else:
        settings["compressor_type"] = "modernbert" if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES else "llm"
        settings["compressor_prompt"] = prompt_of_pair(tokenizer) if layout.reads_question else "{document}"
    settings["keep_final_norm"] = layout.keeps_norm if layout.compressor == "trimmed" else None
    settings["use_projector"] = layout.mlp_size is not None
    if layout.mlp_size is not None:
        settings["projector_hidden_size"] = layout.mlp_size
    return settings


def prompt_of_pair(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The row that a tokenizer makes of two texts; None where that is ScaleDown's own way."""
    if tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None:
        return None
    before, between, after = pair_frame(tokenizer)
    if after or not (before and between):
        shown = ", ".join(str(tokenizer.convert_ids_to_tokens(ids)) for ids in (before, between, after))
        raise ScaleDownError(
            f"The compressor's tokenizer has no cls_token and sep_token, and puts {shown} before, between and after "
            "two texts: ScaleDown has an equivalent only of special tokens before and between."
        )
    first, second = ("".join(tokenizer.convert_ids_to_tokens(ids)) for ids in (before, between))
    return f"{first}{{question}}{second}{{document}}"


def padding_of(layout: Layout, compressor: Compressor, side: str | None) -> str | None:
    """Where padding must be counted for positions to be those of the published class; None where it changes nothing.

    Args:
        layout: What the configuration says.
        compressor: The compressor.
        side: The side that rows are padded on; None for what the class does.

    Raises:
        ScaleDownError: Padding would reach a window of attention.
    """
    if side is None:
        side = compressor.tokenizer.padding_side if layout.compressor == "trimmed" else "left"
    config = compressor.backbone.config
    if config.model_type in POSITIONS_AFTER_PADDING:
        return None
    turns = any(getattr(config, name, None) is not None for name in ("rope_parameters", "rope_theta", "rope_scaling"))
    if side == "left":
        return None if turns else "left"
    window = getattr(config, "sliding_window", None)
    used = getattr(config, "use_sliding_window", True)
    if window is not None and used and window < layout.row_length + layout.num_slots:
        raise ScaleDownError(
            f"Rows are padded on the right, and {config.model_type} attends to windows of {window} tokens, in which "
            "padding takes places: ScaleDown has no equivalent."
        )
    return "right"
