"""From a published checkpoint to a ScaleDown model."""

from typing import Any

import torch

from configuration_scaledown import ScaleDownConfig
from errors_scaledown import ScaleDownError
from generation_scaledown import greedy_settings
from modeling_scaledown import ScaleDownModel
from processing_scaledown import ScaleDownProcessor

from .adapters import LORA_SCALE, fill_lora
from .arguments import ConversionArguments
from .compressor import Compressor, load_compressor, padding_of
from .decoder import Decoder, load_decoder
from .layout import Layout, read_layout
from .reranking import find_reranking
from .source import Source, read_weights

SYSTEM_PROMPT = (
    "You are a helpful assistant. Your task is to extract relevant information from provided documents and to answer "
    "to questions as briefly as possible."
)
USER_PROMPT = "Background:\n{documents}\n\nQuestion:{question}"
PROBE = "Who wrote it?"


@torch.no_grad()
def convert(source: Source, args: ConversionArguments) -> ScaleDownModel:
    """Build a ScaleDown model from a published checkpoint.

    Args:
        source: The checkpoint; its tensors are used up.
        args: What it does not say by itself.

    Raises:
        ScaleDownError: It is damaged, ambiguous, or of a kind that ScaleDown has no equivalent of.
    """
    layout = read_layout(source.config, source.name, args.reads_question, args.max_length)
    read_weights(source)
    dtype = "auto" if args.dtype is None else getattr(torch, args.dtype)
    decoder = load_decoder(source, layout, args.decoder, args.decoder_revision, dtype)
    check_prompt(decoder)
    compressor = load_compressor(
        source, layout, decoder, args.compressor_base, args.compressor_revision, decoder.model.dtype
    )
    head = find_reranking(source, compressor.table, compressor.explained, args.reranking, args.reranking_row)
    settings = settings_of(layout, decoder, compressor, args)
    settings["enable_reranking"] = head is not None
    config = ScaleDownConfig(**settings)
    model = ScaleDownModel(config, generator=decoder.model, backbone=compressor.backbone)
    if config.lora_config is not None:
        fill_lora(model.generator, decoder.adapters["decoder_adapter"])
    own = {"memory_embeddings": compressor.memory}
    if layout.sep:
        own["separator_embedding"] = decoder.row(layout.decoder_tokens, "<SEP>")
    if head is not None:
        own["rerank_embedding"] = head.embedding
        own.update({"reranking_head.weight": head.weight, "reranking_head.bias": head.bias})
        config.reranking_trained = True
    for name, tensor in (compressor.projector or {}).items():
        own[f"projector.{name}"] = tensor
    for name, parameter in model.compressor.named_parameters():
        if name.startswith("backbone."):
            continue
        if name not in own or own[name].shape != parameter.shape:
            found = tuple(own[name].shape) if name in own else "nothing"
            raise ScaleDownError(f"{name} has shape {tuple(parameter.shape)}, and the checkpoint {found} for it.")
        parameter.data = own[name].to(decoder.model.dtype).clone()
    model.generation_config = greedy_settings(decoder.model.generation_config, decoder.tokenizer)
    model.processor = ScaleDownProcessor.from_config(config, decoder.tokenizer, compressor.tokenizer)
    # The weights' own terms, which only their repository states.
    model.card_fields = {"license": "other", **({"base_model": source.name} if source.commit is not None else {})}
    model.remember_generator()
    if args.merge_lora:
        model.merge_lora()
    return model.eval()


def settings_of(layout: Layout, decoder: Decoder, compressor: Compressor, args: ConversionArguments) -> dict[str, Any]:
    """Fields of the configuration."""
    settings = {
        **compressor.settings,
        "generator_config": decoder.model.config,
        "compressor_config": compressor.backbone.config,
        "num_memory_tokens": layout.num_slots,
        "compression_rate": -(-layout.doc_max_length // layout.num_slots),
        "chunk_length": layout.doc_max_length,
        "max_query_length": layout.row_length,
        "compressor_max_length": layout.row_length,
        "compressor_padding_side": padding_of(layout, compressor, args.padding_side),
        "fixed_slots": True,
        "learned_separator": layout.sep,
        "tokenize_jointly": True,
        "penalize_prompt": False,  # the published class gives its decoder embeddings, and no ids of them
        "document_separator": "",
        "system_prompt": SYSTEM_PROMPT,
        "user_prompt": USER_PROMPT,
        "weights_format": args.weights_format,
        "generator_name_or_path": decoder.name,
        "generator_revision": decoder.revision,
        "generator_fingerprint": decoder.fingerprint,
    }
    if args.final_norm is not None:
        settings["keep_final_norm"] = args.final_norm
    if layout.lora_r is not None:
        settings["lora_config"] = {
            "r": layout.lora_r,
            "lora_alpha": int(LORA_SCALE * layout.lora_r),
            "lora_dropout": 0.1,
            "target_modules": "all-linear",
        }
    if args.weights_format == "delta" and decoder.fingerprint is None:
        raise ScaleDownError(
            "The decoder's own weights are not those of its base model (or its vocabulary has another size), so that a "
            "delta would leave out what it learned. Leave --weights_format out."
        )
    return settings


def check_prompt(decoder: Decoder) -> None:
    """Refuses a chat template that the published class and ScaleDown would use differently.

    Raises:
        ScaleDownError: There is none, or it takes no system message.
    """
    tokenizer = decoder.tokenizer
    if tokenizer.chat_template is None:
        raise ScaleDownError(f"{decoder.name} has no chat template, which the published class fills.")
    messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": PROBE}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates raise errors of their own choosing
        text = str(error)
    if SYSTEM_PROMPT not in text or PROBE not in text:
        raise ScaleDownError(
            f"The chat template of {decoder.name} takes no system message. The published class and ScaleDown put it "
            "into the user's in different ways; name a decoder whose template takes one: --decoder."
        )
