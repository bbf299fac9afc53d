"""Builders of tiny models, shared by the tests."""

import copy
import functools

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    BertConfig,
    DebertaV2Config,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from scaledown import ScaleDownConfig, ScaleDownModel, ScaleDownProcessor

QUESTIONS = ["Who wrote the novel Ivanhoe?", "Where does the Loire rise, and how long is it?", "What is a heron?"]
DOCUMENTS = [
    [
        "Ivanhoe is a historical novel by Walter Scott, published in three volumes in 1819.",
        "The Talisman is another of his novels, set in Palestine during the Third Crusade.",
    ],
    ["The Loire rises in the Cévennes and is 1,006 kilometres long. " * 6],
    ["Herons are long-legged birds.", "A crane is a machine. It lifts things.", "Storks build nests on chimneys."],
]
ANSWERS = ["Walter Scott", "In the Cévennes; 1,006 kilometres", "A long-legged bird"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SPECIAL_TOKENS = ["<s>", "</s>", "<pad>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]


def build_tokenizer(chat: bool = True, pair: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 400 tokens; `pair` gives it the frame of an encoder."""
    # A processor that is saved notes its name in its tokenizers, where the next test must not find it.
    return copy.deepcopy(_build_tokenizer(chat, pair))


@functools.cache
def _build_tokenizer(chat: bool, pair: bool) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["[CLS]", "[SEP]", "[PAD]", "[UNK]"] if pair else SPECIAL_TOKENS
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([text for listed in DOCUMENTS for text in listed] + QUESTIONS, trainer)
    if pair:
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            cls_token="[CLS]",
            sep_token="[SEP]",
            pad_token="[PAD]",
            unk_token="[UNK]",
            eos_token="[SEP]",
        )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=SPECIAL_TOKENS[3:],
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


SHAPE = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    # Random weights of the usual size are so small that attention hardly matters; tests must see it.
    "initializer_range": 0.2,
}
# What a test takes grows with the layers, so there are no more than show that a model has several; tests of what layers
# do to one another ask for more.
GENERATORS = {
    "llama": lambda **more: LlamaConfig(**{**SHAPE, **more}),
    "mistral": lambda **more: MistralConfig(**{**SHAPE, "head_dim": 8, **more}),
    "qwen2": lambda **more: Qwen2Config(**{**SHAPE, **more}),
    "qwen3": lambda **more: Qwen3Config(**{**SHAPE, "head_dim": 8, **more}),
    "gemma": lambda **more: GemmaConfig(**{**SHAPE, "head_dim": 8, **more}),
    "gemma2": lambda **more: AutoConfig.for_model("gemma2", **{**SHAPE, "head_dim": 8, "sliding_window": 16, **more}),
    "gemma3": lambda **more: _gemma3({**SHAPE, "head_dim": 8, "sliding_window": 16, **more}),
    "phi3": lambda **more: Phi3Config(**{**SHAPE, **more}),
}


def _gemma3(fields: dict):
    kinds = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    return AutoConfig.for_model("gemma3_text", **{"layer_types": kinds[: fields["num_hidden_layers"]], **fields})


# Rotary positions are relative, so that only a model with learned ones notices when padding is counted.
LEARNED_POSITIONS = {
    "gpt2": lambda num_hidden_layers=SHAPE["num_hidden_layers"]: GPT2Config(
        **{name: SHAPE[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")},
        n_embd=32,
        n_layer=num_hidden_layers,
        n_head=4,
        n_positions=512,
        initializer_range=0.2,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        attn_pdrop=0.0,
    ),
}
ENCODER_SHAPE = {name: SHAPE[name] for name in ("vocab_size", "num_attention_heads", "max_position_embeddings")} | {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "initializer_range": 0.2,
    "pad_token_id": 2,
}
ENCODERS = {
    "modernbert": lambda: ModernBertConfig(
        **ENCODER_SHAPE, cls_token_id=0, sep_token_id=1, bos_token_id=0, eos_token_id=1, local_attention=32
    ),
    "bert": lambda: BertConfig(**ENCODER_SHAPE),
    "deberta": lambda: DebertaV2Config(
        **ENCODER_SHAPE,
        relative_attention=True,
        position_biased_input=False,
        pos_att_type=["p2c", "c2p"],
        type_vocab_size=0,
    ),
}


def build_config(
    compressor_type: str, generator: str = "llama", compressor: str | None = None, num_layers: int = 2, **kwargs
):
    """Configuration of a tiny model, whose generator has `num_layers`; chunks of 32 tokens become 4 slots."""
    compressor_config = None
    if compressor_type == "modernbert":
        compressor_config = ENCODERS[compressor or "modernbert"]()
    elif compressor_type == "llm":
        compressor_config = LlamaConfig(**{**SHAPE, "hidden_size": 24, "num_hidden_layers": 2})
    settings = {
        "num_compressor_layers": num_layers // 2,
        "num_memory_tokens": 4,
        "compression_rate": 8,
        "chunk_length": 32,
        "max_query_length": 24,
        "projector_hidden_size": 40,
        "initializer_range": 0.2,
        "system_prompt": "Answer.",
    }
    return ScaleDownConfig(
        generator_config={**GENERATORS, **LEARNED_POSITIONS}[generator](num_hidden_layers=num_layers),
        compressor_config=compressor_config,
        compressor_type=compressor_type,
        **{**settings, **kwargs},
    )


def build_model(compressor_type: str = "n_layers", seed: int = 0, lora: bool = False, **kwargs) -> ScaleDownModel:
    """A tiny random model with its processor, in evaluation mode."""
    config = build_config(compressor_type, **kwargs)
    torch.manual_seed(seed)
    model = ScaleDownModel(config)
    pair = build_tokenizer(pair=True) if compressor_type == "modernbert" else None
    model.processor = ScaleDownProcessor.from_config(config, build_tokenizer(), pair)
    model.generation_config.pad_token_id = SHAPE["pad_token_id"]
    if lora:
        model.add_lora(r=4, lora_alpha=8, lora_dropout=0.0)
    return model.eval()


@torch.no_grad()
def assert_alike_alone_and_together(model: ScaleDownModel):
    """Neither padding nor other questions in a batch change slots or scores."""
    whole = model.compress(QUESTIONS, DOCUMENTS)
    alone = [model.compress(question, documents) for question, documents in zip(QUESTIONS, DOCUMENTS, strict=True)]
    torch.testing.assert_close(whole.reranking_scores, torch.cat([part.reranking_scores for part in alone]))
    own = torch.cat([part.memory_embeddings[part.memory_mask] for part in alone])
    torch.testing.assert_close(whole.memory_embeddings[whole.memory_mask], own, rtol=1e-4, atol=1e-5)


def randomize_lora(model: ScaleDownModel) -> ScaleDownModel:
    """LoRA layers as after some training: fresh ones have B = 0, hence no effect, and no gradient on A."""
    with torch.no_grad():
        for name, parameter in model.generator.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def only(batch: dict, *names: str) -> dict:
    """A part of a batch; every name must be there."""
    return {name: batch[name] for name in names}
