"""The tokenizer of the world: one token for each of its words, however it is placed."""

import string

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .names import Names
from .text import CONTRASTS, FILLERS, MONTHS, NOMINALS, OPENINGS, RELATIONS, WORDS

SPECIAL = ["<s>", "</s>", "<pad>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>"]
SYSTEM_PROMPT = "Answer from the passages."
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PIECE = "##"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer from the world's words.

    A word is a token wherever it stands, so that what is read and what is answered are the same tokens. Numbers of up
    to three digits are tokens; longer ones go on in pieces. Words the world does not know are spelled.

    Returns:
        The tokenizer, with its chat template.
    """
    characters = [character for character in string.printable if not character.isspace()]
    numbers = [str(number) for number in range(10, 1000)]
    digits = [str(number).zfill(width) for width in (1, 2) for number in range(10**width)]
    vocabulary = dict.fromkeys([*SPECIAL, *characters, *numbers, *_words()])
    vocabulary |= dict.fromkeys(PIECE + piece for piece in [*digits, *characters])
    ids = {token: place for place, token in enumerate(vocabulary)}
    backend = Tokenizer(
        models.WordPiece(ids, unk_token="<unk>", continuing_subword_prefix=PIECE, max_input_chars_per_word=200)
    )
    backend.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents()])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[^\p{L}\p{N}]"), "isolated")]
    )
    backend.decoder = decoders.WordPiece(prefix=PIECE)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=SPECIAL[4:],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _words() -> list[str]:
    """Every word a passage, a question or a prompt of the world may have, always in the same order."""
    names = Names()
    texts = [SYSTEM_PROMPT, "Background Question", *FILLERS, *CONTRASTS, MONTHS, *names.rivers, *WORDS.values()]
    texts += [*NOMINALS.values(), *(opening for listed in OPENINGS.values() for opening in listed)]
    for relations in RELATIONS.values():
        for relation in relations:
            texts += [relation.name, *relation.statements, *relation.questions, relation.description or ""]
    texts += [part for parts in names.parts.values() for part in (*parts[0], *parts[1])]
    texts += ["he she it her his him its He She It Her His Him Its The s"]
    splitter = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[^\p{L}\p{N}]"), "removed")]
    )
    words = dict.fromkeys(word for text in texts for word, _ in splitter.pre_tokenize_str(text))
    return [*words, *(word.capitalize() for word in list(words) if word.capitalize() not in words)]
