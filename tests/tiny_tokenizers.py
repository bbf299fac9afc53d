"""Tokenizers of several families, made on the spot."""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


def build_wordpiece(unknown: bool = True):
    """An encoder's tokenizer of another family, with a normalizer."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789[]<>|/_.,?'"
    words = ["[CLS]", "[SEP]", "[PAD]", "[MASK]", *letters, *(f"##{letter}" for letter in letters), "river", "sep"]
    words += ["[UNK]"] if unknown else []
    vocabulary = {word: index for index, word in enumerate(words)}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]" if unknown else "[PAD]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", mask_token="[MASK]"
    )


def build_unigram():
    """A SentencePiece-like vocabulary that holds the special tokens as pieces of its own, as Llama 2's does."""
    printable = [chr(i) for i in range(33, 127)]
    vocabulary = [("<s>", 0.0), ("</s>", 0.0), ("<pad>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("\n", -2.0)]
    vocabulary += [(character, -3.0) for character in printable] + [("[/INST]", -1.0), ("▁Question", -1.0)]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=3, byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.add_tokens(["[INST]"])
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[INST]{{ m['content'] }}[/INST]{% endfor %}"
        "{% if add_generation_prompt %}Answer:{% endif %}"
    )
    return tokenizer
