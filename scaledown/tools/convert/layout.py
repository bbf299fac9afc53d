"""What the configuration of a published checkpoint says, checked against what ScaleDown can be."""

import logging
import re
from dataclasses import dataclass
from typing import Any

from errors_scaledown import ScaleDownError

TRIMMED = "mistral_trimmed"
ADDED_BEHIND_SLOTS = ("<AE>", "<ENC>", "<SEP>")
# What the published class takes a setting for where the file says nothing.
DEFAULTS = {
    "quantization": "no",
    "sep": False,
    "compr_model_name": None,
    "compr_n_layers": None,
    "compr_every_n_layer": None,
    "compr_base_model_name": "mistralai/Mistral-7B-Instruct-v0.2",
    "compr_rms_norm": False,
    "compr_mlp_hidden_dim": 8096,
    "compr_use_mlp": True,
    "lora": False,
    "lora_compressor": False,
    "lora_r": 16,
    "lora_r_compressor": None,
    "training_form": "both",
    "different_mem_tokens": False,
    "kbtc_training": False,
}
# Tokens that each kind of row has beside `max_length`, with a question in it and without.
MARGINS = {"decoder": (8, 3), "trimmed": (8, 2), "separate": (3, 2)}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layout:
    """A published model.

    Args:
        decoder: Name of the base decoder.
        compressor: `"decoder"` (the decoder reads documents too), `"trimmed"` (first layers) or `"separate"`.
        compressor_base: Name of the base of a compressor of its own.
        doc_max_length: Document tokens that the memory embeddings stand for.
        num_slots: Memory embeddings of a document.
        sep: Whether a separator's embedding follows each document.
        different_mem_tokens: Whether a decoder that compresses has a memory token for each slot.
        num_layers: Of a trimmed compressor.
        keeps_norm: Whether its final norm is kept.
        mlp_size: Width of the projector; None without one.
        lora_r: Rank of the decoder's LoRA; None where it was trained whole.
        compressor_lora_r: Rank of the compressor's LoRA; None where it was trained whole.
        reads_question: Whether the compressor reads the question.
        max_length: Tokens of question and document.
    """

    decoder: str
    compressor: str
    compressor_base: str | None
    doc_max_length: int
    num_slots: int
    sep: bool
    different_mem_tokens: bool
    num_layers: int | None
    keeps_norm: bool
    mlp_size: int | None
    lora_r: int | None
    compressor_lora_r: int | None
    reads_question: bool
    max_length: int

    @property
    def slot_tokens(self) -> list[str]:
        """Memory tokens that the compressor's vocabulary was widened by, in their order."""
        if self.compressor == "decoder" and not self.different_mem_tokens:
            return ["<MEM>"]
        return [f"<MEM{i}>" for i in range(self.num_slots)]

    @property
    def decoder_tokens(self) -> list[str]:
        """Tokens that the decoder's vocabulary was widened by, in their order."""
        slots = [f"<MEM{i}>" for i in range(self.num_slots)] if self.different_mem_tokens else ["<MEM>"]
        return [*slots, *ADDED_BEHIND_SLOTS]

    @property
    def row_length(self) -> int:
        """Tokens of a compressor's row in front of the memory tokens."""
        return self.max_length + MARGINS[self.compressor][0 if self.reads_question else 1]


def read_layout(config: dict[str, Any], name: str, reads_question: bool | None, max_length: int | None) -> Layout:
    """Read a published configuration.

    Args:
        config: What config.json holds.
        name: Name or folder of the checkpoint.
        reads_question, max_length: As in the options.

    Raises:
        ScaleDownError: It is no configuration of the layout, or of a model that ScaleDown has no equivalent of.
    """
    if "decoder_model_name" not in config:
        raise ScaleDownError(
            f"{name} has model_type={config.get('model_type')!r} and no decoder_model_name: its config.json is not of "
            "the published OSCAR and PISCO class."
        )
    if "doc_max_length" not in config or "compr_linear_type" in config:
        raise ScaleDownError(
            f"{name} is of the older COCOM class (cocom-v1): config.json has "
            f"{'compr_linear_type' if 'compr_linear_type' in config else 'no doc_max_length'}. How many memory tokens "
            "a document has depends there on the longest one beside it, which no ScaleDown setting does."
        )
    missing = sorted(DEFAULTS.keys() - config.keys())
    if missing:
        logger.warning(
            "config.json does not say %s; read as the published class's defaults: %s.",
            ", ".join(missing),
            ", ".join(f"{key}={DEFAULTS[key]}" for key in missing),
        )
    said = {**DEFAULTS, **config}
    if said["compr_every_n_layer"] is not None:
        raise ScaleDownError(
            f"{name} has compr_every_n_layer={said['compr_every_n_layer']}: a compressor of every n-th layer, which "
            "ScaleDown has no equivalent of."
        )
    if said["kbtc_training"]:
        raise ScaleDownError(
            f"{name} has kbtc_training=True, which adds a token that ScaleDown has no equivalent of and whose use at "
            "inference is not known."
        )
    for field in ("doc_max_length", "compr_rate"):
        value = said.get(field)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ScaleDownError(
                f"{name} has {field}={value!r} in its config.json, which must be a whole number of at least 1: the "
                "number of memory tokens comes from it. Restore the published file."
            )
    num_slots = said["doc_max_length"] // said["compr_rate"]
    if num_slots < 1:
        raise ScaleDownError(
            f"{name} has doc_max_length={said['doc_max_length']} and compr_rate={said['compr_rate']}: no memory token."
        )
    compressor, base = "decoder", None
    if said["compr_model_name"] == TRIMMED:
        compressor, base = "trimmed", said["compr_base_model_name"]
        if said["compr_n_layers"] is None:
            raise ScaleDownError(f"{name} has a trimmed compressor and no compr_n_layers.")
    elif said["compr_model_name"] is not None:
        compressor, base = "separate", said["compr_model_name"]
    if said["quantization"] != "no":
        logger.warning(
            "%s was trained with quantization=%s. The published class quantizes the decoder again where there is a "
            "GPU; the converted model has it unquantized, and differs by that.",
            name,
            said["quantization"],
        )
    own_lora = said["lora_compressor"] and compressor != "decoder"
    return Layout(
        decoder=said["decoder_model_name"],
        compressor=compressor,
        compressor_base=base,
        doc_max_length=said["doc_max_length"],
        num_slots=num_slots,
        sep=said["sep"],
        different_mem_tokens=said["different_mem_tokens"],
        num_layers=said["compr_n_layers"] if compressor == "trimmed" else None,
        keeps_norm=said["compr_rms_norm"] if compressor == "trimmed" else True,
        mlp_size=said["compr_mlp_hidden_dim"] if compressor != "decoder" and said["compr_use_mlp"] else None,
        lora_r=said["lora_r"] if said["lora"] else None,
        compressor_lora_r=(said["lora_r_compressor"] or said["lora_r"]) if own_lora else None,
        reads_question=question_is_read(name, reads_question),
        max_length=128 if max_length is None else max_length,
    )


def question_is_read(name: str, said: bool | None) -> bool:
    """Whether a compressor reads the question: as the option says, or the name of the model.

    Raises:
        ScaleDownError: Neither says it.
    """
    if said is not None:
        return said
    kinds = set(re.findall(r"oscar|pisco|cocom", str(name).rstrip("/").rpartition("/")[2].lower()))
    if kinds == {"oscar"}:
        return True
    if kinds and "oscar" not in kinds:
        return False
    raise ScaleDownError(
        f"Neither the name {name!r} nor config.json says whether the compressor reads the question: OSCAR's does, "
        "PISCO's does not. Say it: --reads_question true or --reads_question false."
    )
