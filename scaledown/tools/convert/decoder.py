"""The decoder of a published checkpoint: its base model, the rows of its vocabulary, and its LoRA."""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from backbones_scaledown import check_generator, refuse_adapter, refuse_unknown
from errors_scaledown import ScaleDownError
from families_scaledown import language_model_config
from gguf_scaledown import read_config
from weights_scaledown import absolute_name, load_complete, pin_revision, weights_fingerprint

from .adapters import Adapter, read_adapter
from .layout import Layout
from .source import Source

ENDS_FILE = "decoder_first_last_layers.pth"
ADAPTERS_FILE = "adapters.pth"

logger = logging.getLogger(__name__)


@dataclass
class Decoder:
    """A decoder as the published class has it once it is loaded.

    Args:
        model: The base model, whose vocabulary is cut back to that of its tokenizer.
        tokenizer: Its tokenizer, without the tokens that were added.
        table: Its embeddings, rows of added tokens included; None where the source has none.
        adapters: LoRA by name; empty where the decoder was trained whole.
        name: Folder or name of the base model.
        revision: Its commit.
        fingerprint: That of its weights, if those are unchanged.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    table: torch.Tensor | None
    adapters: dict[str, Adapter]
    name: str
    revision: str | None
    fingerprint: str | None

    @property
    def known(self) -> int:
        """Tokens of the vocabulary before any was added."""
        return len(self.tokenizer)

    def row(self, tokens: list[str], token: str) -> torch.Tensor:
        """The embedding of an added token."""
        return self.table[self.known + tokens.index(token)]


def find_base(name: str, revision: str | None) -> tuple[str, Any, dict]:
    """Name, configuration and place of a base model.

    Args:
        name: Folder or name on the Hub.
        revision: Branch, tag or commit.
    """
    name = absolute_name(name)
    hub = {key: value for key, value in pin_revision(name, {"revision": revision}).items() if key != "gguf_file"}
    refuse_adapter(name, hub)
    refuse_unknown(name, hub)
    return name, language_model_config(read_config(name, {**hub, "gguf_file": None})), hub


def check_embeddings(module: nn.Module, name: str) -> None:
    """Refuses embeddings that are not what their rows say, such as Gemma's, which are scaled."""
    if type(module) is not nn.Embedding:
        raise ScaleDownError(
            f"{name} has embeddings of its own kind ({type(module).__name__}), which change the rows they are given; "
            "the published class puts embeddings in their place unchanged, and ScaleDown does not."
        )


def with_rows(model: PreTrainedModel, rows: int) -> None:
    """Cut a model's vocabulary to its first tokens, or widen it by rows that are filled later."""
    if model.get_input_embeddings().weight.shape[0] != rows:
        model.resize_token_embeddings(rows, mean_resizing=False)


@torch.no_grad()
def load_decoder(source: Source, layout: Layout, name: str | None, revision: str | None, dtype: Any) -> Decoder:
    """Load the decoder of a published checkpoint.

    Args:
        source: Its weights; those of the decoder are taken out.
        layout: What its configuration says.
        name, revision: Where its base model is, if elsewhere than the layout says.
        dtype: Type of the weights.

    Raises:
        ScaleDownError: The files do not go together.
    """
    name, config, hub = find_base(name or layout.decoder, revision)
    check_generator(name, config)
    if getattr(config, "embedding_multiplier", 1.0) != 1.0:
        raise ScaleDownError(f"{name} multiplies the embeddings it is given, slots included; it cannot be converted.")
    tokenizer = AutoTokenizer.from_pretrained(name, **hub)
    model = load_complete(AutoModelForCausalLM, name, config=config, dtype=dtype, **hub)
    check_embeddings(model.get_input_embeddings(), name)
    known, original = len(tokenizer), model.get_input_embeddings().weight.shape[0]
    with_rows(model, known)
    fingerprint = weights_fingerprint(name, **hub) if known == original else None
    table, changed = None, False
    ends = source.take(ENDS_FILE)
    if layout.lora_r is None:
        table, changed = take_whole_decoder(source, model, known), True
    elif ends:
        table = one_of(ends, "embed_tokens.weight", ENDS_FILE)
        head = one_of(ends, "lm_head.weight", ENDS_FILE)
        if table is None:
            raise ScaleDownError(f"{ENDS_FILE} holds no embed_tokens.weight.")
        for module, rows in ((model.get_input_embeddings(), table), (model.get_output_embeddings(), head)):
            if rows is not None:
                check_rows(rows, module.weight, known, ENDS_FILE)
                changed |= not torch.equal(module.weight, rows[:known].to(module.weight.dtype))
                module.weight.copy_(rows[:known])
    if table is None and (layout.sep or layout.compressor == "decoder" or known > original):
        raise ScaleDownError(f"{source.name} has no {ENDS_FILE}, which holds the embeddings of its own tokens.")
    adapters = {}
    if layout.lora_r is not None:
        found = source.take(ADAPTERS_FILE)
        for full, tensor in found.items():
            adapter, _, key = full.partition("/")
            adapters.setdefault(adapter, {})[key] = tensor
        adapters = {key: read_adapter(state, layout.lora_r, key, ends) for key, state in adapters.items()}
        unknown = adapters.keys() - {"decoder_adapter", "encoder_adapter"}
        if "decoder_adapter" not in adapters or unknown:
            names = ", ".join(sorted(adapters)) or "none"
            raise ScaleDownError(
                f"{ADAPTERS_FILE} has the adapters {names}; expected decoder_adapter, encoder_adapter."
            )
    return Decoder(model, tokenizer, table, adapters, name, hub["revision"], None if changed else fingerprint)


def one_of(tensors: dict[str, torch.Tensor], ending: str, file: str) -> torch.Tensor | None:
    """The one tensor whose name ends so; None without any."""
    found = [name for name in tensors if f".{name}".endswith(f".{ending}")]
    if len(found) > 1:
        raise ScaleDownError(f"{file} holds {len(found)} tensors named {ending}: {', '.join(found)}.")
    return tensors[found[0]] if found else None


def check_rows(rows: torch.Tensor, own: torch.Tensor, known: int, file: str) -> None:
    """Refuses a table of another width, or one without a row for each known token."""
    if rows.dim() != 2 or rows.shape[1] != own.shape[1] or rows.shape[0] < known:
        raise ScaleDownError(
            f"{file} has a table of shape {tuple(rows.shape)}, and the base model {known} tokens of {own.shape[1]} "
            "numbers; name the right base model: --decoder."
        )


def take_whole_decoder(source: Source, model: PreTrainedModel, known: int) -> torch.Tensor:
    """Fill a decoder that was trained whole, and return its table with the rows of added tokens."""
    state = take_prefixed(source, "decoder.")
    if not state:
        raise ScaleDownError(
            f"{source.name} was saved whole (lora=False), and none of its tensors begins with decoder."
        )
    table = one_of(state, "embed_tokens.weight", "the checkpoint")
    with_rows(model, table.shape[0])
    load_whole(model, state, "the decoder")
    with_rows(model, known)
    return table


def take_prefixed(source: Source, prefix: str) -> dict[str, torch.Tensor]:
    """Take tensors of a model saved whole, in shards or not, by what their names begin with."""
    taken = {}
    for full in list(source.tensors):
        file, _, name = full.partition(":")
        if "/" not in file and name.startswith(prefix):
            taken[name.removeprefix(prefix)] = source.tensors.pop(full)
    return taken


def load_whole(model: nn.Module, state: dict[str, torch.Tensor], what: str) -> None:
    """Load all weights of a model; those of a pooler and buffers that follow from the configuration do not count."""
    counted = dict(model.named_parameters(remove_duplicate=False))
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wrong = [name for name in counted if name in state and shapes[name] != tuple(counted[name].shape)]
    tied = {id(counted[name]) for name in counted if name in state}
    missing = [n for n, p in counted.items() if n not in state and id(p) not in tied and not n.startswith("pooler.")]
    unknown = [
        name
        for name in state
        if name not in counted and not name.startswith("pooler.") and not name.endswith(("inv_freq", "position_ids"))
    ]
    if wrong or missing or unknown:
        problems = [
            f"{len(names)} {kind} ({names[0]}{f' {shapes[names[0]]}' if names[0] in shapes else ''}, …)"
            for kind, names in (("of another shape", wrong), ("missing", missing), ("unknown", unknown))
            if names
        ]
        raise ScaleDownError(f"The weights of {what} do not fit its base model: {', '.join(problems)}.")
    model.load_state_dict({name: state[name] for name in counted if name in state}, strict=False)
