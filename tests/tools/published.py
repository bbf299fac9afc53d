"""Folders in the layout of published checkpoints, with tiny random weights, and what their own class makes of them."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModel, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from folders import save_encoder, save_generator
from published_reference import ReferenceConfig, ReferenceModel
from scaledown import ScaleDownModel
from scaledown.tools.convert.arguments import ConversionArguments
from scaledown.tools.convert.model import convert
from scaledown.tools.convert.read_pickle import flattened
from scaledown.tools.convert.source import open_source
from tiny import CHAT_TEMPLATE, SHAPE, SPECIAL_TOKENS, build_tokenizer
from tiny_tokenizers import build_unigram

# Two documents each, one of them longer than a row.
QUESTIONS = ["Who wrote the novel Ivanhoe?", "Where does the Loire rise, and how long is it?"]
DOCUMENTS = [
    ["Ivanhoe is a historical novel by Walter Scott.", "It lifts things."],
    ["The Loire rises in the Cévennes and is 1,006 kilometres long. " * 6, "Herons are long-legged birds."],
]
MAX_LENGTH = 40


@dataclass
class Variant:
    """A kind of published model.

    Args:
        settings: Of its configuration.
        decoder: Kind of its decoder.
        compressor: Kind of a base of the compressor's own: an encoder's, `llama`, or `other` for a decoder's sibling.
        with_questions: Whether the compressor reads the question.
        padding_side: Of the base tokenizers.
        tokenizer: Its family: `bytes`, `unigram`, or `split`, whose words take a sign in front of them along.
        max_length: Tokens of question and document.
        generation: Settings of its decoder's generation.
        saved: How its adapters are saved.
        expected: Fields of the converted configuration.
    """

    settings: dict[str, Any]
    decoder: str = "mistral"
    compressor: str | None = None
    with_questions: bool = True
    padding_side: str = "left"
    tokenizer: str = "bytes"
    max_length: int = MAX_LENGTH
    generation: dict[str, Any] = field(default_factory=dict)
    saved: dict[str, Any] = field(default_factory=dict)
    expected: dict[str, Any] = field(default_factory=dict)


def build_split() -> PreTrainedTokenizerFast:
    """A byte-level BPE that splits texts as those of recent models do: `?Document` and `:Who` are tokens."""
    backend = Tokenizer(models.BPE())
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(
        ["?Document:\nIvanhoe", ":Who wrote", ":Where", *DOCUMENTS[0], *DOCUMENTS[1]] * 3, trainer
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", extra_special_tokens=SPECIAL_TOKENS[3:]
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


TOKENIZERS = {"bytes": build_tokenizer, "unigram": build_unigram, "split": build_split}


def save_base(folder: Path, kind: str, padding_side: str, family: str = "bytes") -> Path:
    """A language model whose tokenizer pads on a side."""
    save_generator(folder, kind, seed=5, num_hidden_layers=4)
    tokenizer = TOKENIZERS[family]()
    tokenizer.padding_side = padding_side
    tokenizer.save_pretrained(folder)
    return folder


def save_compressor(folder: Path, kind: str, padding_side: str) -> Path:
    """A base of the compressor's own."""
    if kind in ("modernbert", "bert"):
        return save_encoder(folder, kind, seed=6)
    if kind == "llama":
        torch.manual_seed(6)
        AutoModel.from_config(LlamaConfig(**{**SHAPE, "hidden_size": 24, "num_hidden_layers": 2})).save_pretrained(
            folder
        )
        tokenizer = build_tokenizer()
        pair = {"single": "<s> $A", "pair": "<s> $A <s> $B", "special_tokens": [("<s>", 0)]}  # as Llama 3's
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(**pair)
        tokenizer.save_pretrained(folder)
        return folder
    return save_base(folder, "llama", padding_side)


def build(folder: Path, variant: Variant, seed: int = 0) -> ReferenceModel:
    """Save a published checkpoint in `folder / "oscar"`, and return the model it holds."""
    decoder = save_base(folder / "decoder", variant.decoder, variant.padding_side, variant.tokenizer)
    if variant.generation:
        generation = GenerationConfig.from_pretrained(decoder)
        generation.update(**variant.generation)
        generation.save_pretrained(decoder)
    names = {"decoder_model_name": str(decoder), "compr_base_model_name": str(decoder)}
    if variant.compressor is not None:
        own = str(save_compressor(folder / "base", variant.compressor, variant.padding_side))
        trimmed = variant.settings.get("compr_model_name") == "mistral_trimmed"
        names["compr_base_model_name" if trimmed else "compr_model_name"] = own
    defaults = {"doc_max_length": 32, "compr_rate": 8, "compr_mlp_hidden_dim": 40, "lora_r": 4}
    torch.manual_seed(seed)
    model = ReferenceModel(ReferenceConfig(**{**defaults, **names, **variant.settings})).eval()
    model.randomize()
    model.save_layout(folder / "oscar", **variant.saved)
    return model.eval()


def converted(folder: Path, variant: Variant, **options) -> ScaleDownModel:
    """Convert what `build` saved, save it, and load it as anybody would."""
    given = {"reads_question": variant.with_questions, "max_length": variant.max_length, "dtype": "float32", **options}
    args = ConversionArguments(source=str(folder / "oscar"), output=str(folder / "model"), **given)
    model = convert(open_source(args.source, None), args)
    model.save_pretrained(folder / "model")
    return ScaleDownModel.from_pretrained(folder / "model")


def read_here(paths):
    """In the place of the process that reads pickles: ours are known, and each process takes seconds to start."""
    return {path: flattened(torch.load(path, weights_only=True)) for path in paths}


def set_config(folder: Path, **changes):
    """Change a saved configuration; `...` takes a setting out."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.update(changes)
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}), encoding="utf-8")


@torch.no_grad()
def assert_same(model: ScaleDownModel, reference: ReferenceModel, variant: Variant):
    """Memory embeddings, prompts, logits and answers are those of the published class."""
    with_questions, max_length = variant.with_questions, variant.max_length
    flat = [document for row in DOCUMENTS for document in row]
    asked = [question for question, row in zip(QUESTIONS, DOCUMENTS, strict=True) for _ in row]
    expected = reference.compress_documents(flat, asked if with_questions else None, max_length)
    batch = model.processor(QUESTIONS, DOCUMENTS)
    outputs = model(**batch)
    assert outputs.memory_embeddings.abs().mean() > 0.01
    torch.testing.assert_close(outputs.memory_embeddings[:, : reference.num_slots], expected, rtol=1e-5, atol=1e-5)
    one_by_one = model.compress(asked, [[document] for document in flat], batch_size=1).memory_embeddings
    torch.testing.assert_close(one_by_one[:, : reference.num_slots], expected, rtol=1e-5, atol=1e-5)

    ids, mask = reference.prompts(QUESTIONS, 2)
    assert torch.equal(batch["attention_mask"], mask)
    own = reference.num_known_tokens
    is_text = (ids < own) & mask.bool()
    assert torch.equal(batch["slot_mask"], (ids >= own) & mask.bool())
    assert torch.equal(batch["input_ids"][is_text], ids[is_text])

    logits = reference.logits(QUESTIONS, DOCUMENTS, with_questions, max_length)
    torch.testing.assert_close(outputs.logits[:, -1], logits[:, :own], rtol=1e-5, atol=2e-5)
    answers = reference.generate_from_text(QUESTIONS, DOCUMENTS, 8, with_questions, max_length)
    found = model.answer(QUESTIONS, DOCUMENTS, max_new_tokens=8)
    assert found == [answer.strip() for answer in answers]
    assert any(found) and not torch.allclose(logits[0], logits[1])
