"""The text of an answer, made token by token."""

import random
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from folders import ROOT
from scaledown.serving.decoding import REPLACEMENT, TAIL, Row
from scaledown.serving.jobs import Piece, Sampling
from tiny import build_tokenizer
from tiny_tokenizers import build_unigram, build_wordpiece

TEXT = "The river Komisk, 1,204 km long, isn't far. “Größe” costs 7 €: 🦉🦉 naïve?\n\n  Señor Łódź said: 雨が降る. "
TOKENIZERS = {
    "bytes": build_tokenizer,
    "wordpiece": build_wordpiece,
    "unigram": build_unigram,
    "world": lambda: AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True),
}


class Counting:
    """A tokenizer that knows how many tokens it was given at once."""

    def __init__(self, tokenizer):
        self._tokenizer, self.most = tokenizer, 0

    def decode(self, ids, **options):
        self.most = max(self.most, len(ids))
        return self._tokenizer.decode(ids, **options)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_long_answer_is_the_text_of_its_tokens_without_decoding_all_of_them_each_time(name):
    tokenizer = TOKENIZERS[name]()
    sentences = [TEXT[i : i + 40] for i in range(0, len(TEXT), 20)]
    for seed in range(8):
        texts = random.Random(seed).choices(sentences, k=40)
        ids = tokenizer("".join(texts), add_special_tokens=False)["input_ids"][: 5 * TAIL]
        counting, pieces = Counting(tokenizer), []
        job = SimpleNamespace(sampling=Sampling(), cancelled=False, put=pieces.append)
        row = Row(job, len(ids), counting, end_ids=set())
        for place, token in enumerate(ids, start=1):
            row.add(token)
            written = "".join(piece.text for piece in pieces if isinstance(piece, Piece))
            expected = tokenizer.decode(ids[:place], skip_special_tokens=True).strip()
            assert written == expected or (expected.endswith(REPLACEMENT) and expected.startswith(written))
        assert row.done and len(ids) == 5 * TAIL
        assert counting.most < 3 * TAIL
