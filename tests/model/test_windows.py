"""Windows of text in the generator's tokens, whatever tokenizer the compressor has."""

import numpy as np
import pytest
from transformers import BertTokenizerFast

import windows_scaledown
from scaledown import ScaleDownProcessor
from tiny import DOCUMENTS, QUESTIONS, build_tokenizer
from tiny_tokenizers import build_unigram
from windows_scaledown import find_evidence, holds_evidence, windows_of_chunk

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "paris", "is", "a", "town", ".", "ivan", "##hoe", "who", "wrote", "it"]


def build_processor(**settings) -> ScaleDownProcessor:
    settings = {"chunk_length": 32, "num_memory_tokens": 4, "pointer_window": 4, **settings}
    return ScaleDownProcessor(build_tokenizer(), build_tokenizer(pair=True), **settings)


def uncased() -> BertTokenizerFast:
    return BertTokenizerFast(vocab={word: i for i, word in enumerate(WORDS)})


def windows_of(processor: ScaleDownProcessor, document: str, **kwargs) -> list[list[str]]:
    """Texts of the windows of each chunk, one for each of its own tokens."""
    batch = processor.encode_documents(["Who?"], [[document]], **kwargs)
    own = zip(batch["compressor_windows"], batch["compressor_document_mask"], strict=True)
    return [processor.tokenizer.batch_decode(windows[mask]) for windows, mask in own]


def test_a_window_is_the_text_from_a_token_on():
    processor = build_processor()
    document = DOCUMENTS[1][0]
    ids = processor.tokenizer(document, add_special_tokens=False)["input_ids"]
    batch = processor.encode_documents(QUESTIONS[1:2], [[document]])
    read = []
    for row, mask, windows in zip(
        batch["compressor_input_ids"], batch["compressor_document_mask"], batch["compressor_windows"], strict=True
    ):
        own = row[mask].tolist()
        for place, window in enumerate(windows[mask]):
            shown = processor.tokenizer.decode(window)
            start = min(place, len(own) - 4)
            assert shown == processor.compressor_tokenizer.decode(own[start : start + 4])
        read += own
    # Both tokenizers are trained alike, so that the windows of a token each are the document itself.
    assert processor.tokenizer.decode(ids) == processor.compressor_tokenizer.decode(read)


def test_the_generator_reads_its_own_spelling_of_what_an_uncased_compressor_points_at():
    processor = ScaleDownProcessor(
        build_tokenizer(), uncased(), chunk_length=16, compression_rate=1, num_memory_tokens=16, pointer_window=3
    )
    found = windows_of(processor, "Paris is a town.")
    assert len(found) == 1 and len(found[0]) == 5  # paris, is, a, town and the full stop
    assert found[0][0].startswith("P") and "Paris is a town.".startswith(found[0][0])
    assert all(text in "Paris is a town." for text in found[0])


def test_windows_stay_in_their_chunk_and_short_texts_repeat_their_last_token():
    ids, spans = list(range(10)), np.array([[i, i + 1] for i in range(10)])
    windows, characters = windows_of_chunk(spans[4:8], ids, spans, 3, 3)
    assert windows.tolist() == [[4, 5, 6], [5, 6, 7], [5, 6, 7], [5, 6, 7]]
    assert characters.tolist() == [[4, 7], [5, 8], [5, 8], [5, 8]]
    windows, characters = windows_of_chunk(spans[4:6], ids, spans, 3, 3)
    assert windows.tolist() == [[4, 5, 5], [4, 5, 5]] and characters.tolist() == [[4, 6], [4, 6]]


def test_windows_of_a_chunk_with_few_slots_reach_as_far_as_those():
    ids, spans = list(range(10)), np.array([[i, i + 1] for i in range(10)])
    windows, characters = windows_of_chunk(spans[4:8], ids, spans, 3, 2)
    assert windows[:, :2].tolist() == [[4, 5], [5, 6], [6, 7], [6, 7]]
    assert characters.tolist() == [[4, 6], [5, 7], [6, 8], [6, 8]]


def test_evidence_is_found_as_words_in_any_case():
    text = "Rome or roman, ROME: rome-like 7216."
    spans = np.array([[i, i + 1] for i in range(len(text))])
    windows = np.stack([spans[:, 0], (spans[:, 0] + 6).clip(max=len(text))], axis=1)
    held = holds_evidence(find_evidence(text, ["rome"]), windows, spans)
    starts = {i for i in range(len(text)) if held[i]}
    assert {0, 15, 19} <= starts and 8 not in starts  # not in "roman"
    assert not len(find_evidence(text, ["721", "", " "]))


def test_what_is_longer_than_a_window_is_pointed_at_where_it_begins():
    text = "one two three four five"
    spans = np.array([[match, match + 1] for match in range(len(text))])
    windows = np.stack([spans[:, 0], (spans[:, 0] + 4).clip(max=len(text))], axis=1)
    found = find_evidence(text, ["two three four"])
    held = holds_evidence(found, windows, spans)
    assert held.nonzero()[0].tolist() == [4]
    # In the chunk where it begins, and in no other.
    assert not holds_evidence(found, windows[10:], spans[10:]).any()


@pytest.mark.parametrize(
    ("text", "evidence", "places"),
    [
        ("これは東京のIBMです。", "IBM", [6]),
        ("これは東京のIBMです。", "東京", [3]),
        ("서울은 한국의 수도이다.", "서울", [0]),
        ("กรุงเทพเป็นเมืองหลวง", "กรุงเทพ", [0]),
        ("1400万人とiPhone発売", "万人", [4]),
        ("Walter\n   Scott wrote it.", "Walter Scott", [0]),
        ("(walter scott)", "Walter  Scott", [1]),
        ("Мостом или мост", "мост", [11]),
    ],
)
def test_evidence_is_found_as_each_script_sets_words_apart(text, evidence, places):
    assert find_evidence(text, [evidence])[:, 0].tolist() == places


def test_a_window_begins_with_a_whole_character_and_holds_whole_ones():
    """A character that the generator has no token for is one token for each of its bytes."""
    processor = build_processor(chunk_length=64, num_memory_tokens=64, compression_rate=1, pointer_window=6)
    processor.compressor_tokenizer = build_unigram()  # which spells a letter of English by a token, and makes one of 東
    document = "A kanji 東 and 京 too, and more."
    batch = processor.encode_documents(["Who?"], [[document]], evidence=[[["東", "京"]]])
    mask = batch["compressor_document_mask"]
    texts = processor.tokenizer.batch_decode(batch["compressor_windows"][mask])
    assert not any(text.startswith("\N{REPLACEMENT CHARACTER}") for text in texts)
    assert {text[0] for text in texts} >= {"東", "京"}
    for text, held in zip(texts, batch["pointer_labels"][mask].tolist(), strict=True):
        assert held == ("東" in text or "京" in text), text


def test_labels_name_the_windows_with_the_evidence_of_each_document():
    processor = build_processor(num_memory_tokens=8, compression_rate=1, pointer_window=8)
    evidence = [[["Scott"], []], [["1,006"]], [[], ["lifts"], ["Storks"]]]
    flat = [texts for row in evidence for texts in row]
    batch = processor(QUESTIONS, DOCUMENTS, evidence=evidence)
    documents = batch["chunk_to_document"].tolist()
    rows = zip(batch["pointer_labels"], batch["compressor_windows"], batch["compressor_document_mask"], strict=True)
    for document, (labels, windows, mask) in zip(documents, rows, strict=True):
        assert not labels[~mask].any()
        for label, window in zip(labels[mask], processor.tokenizer.batch_decode(windows[mask]), strict=True):
            assert label == any(text in window for text in flat[document])
    labelled = {document for document, labels in zip(documents, batch["pointer_labels"], strict=True) if labels.any()}
    assert labelled == {0, 2, 4, 5}


def test_text_that_spells_a_special_token_is_pointed_at_as_text():
    processor = build_processor()
    document = "Herons <|end|> stand </s> in water and wait for fish."
    found = windows_of(processor, document)
    control = set(processor.tokenizer.all_special_ids)
    batch = processor.encode_documents(["Who?"], [[document]])
    assert not control & set(batch["compressor_windows"][batch["compressor_document_mask"]].flatten().tolist())
    assert found[0][0].startswith("Her")


@pytest.mark.parametrize(
    ("evidence", "message"),
    [
        ([[["Scott"]]], r"evidence\[0\] has 1 lists of texts for 2 documents"),
        ([], "1 questions but 0 lists of evidence"),
        ([["Scott", ""]], r"evidence\[0\]\[0\] is 'Scott', expected a list of texts"),
        ([[["Scott"], [None]]], r"evidence\[0\]\[1\] is \[None\], expected a list of texts"),
    ],
)
def test_evidence_that_is_not_a_list_of_texts_for_each_document_is_refused(evidence, message):
    with pytest.raises(ValueError, match=message):
        build_processor()(QUESTIONS[0], DOCUMENTS[0], evidence=evidence)


def test_evidence_without_windows_to_point_at_is_refused():
    with pytest.raises(ValueError, match=r'evidence .* slot_pooling="pointer"'):
        build_processor(pointer_window=None)(QUESTIONS[0], DOCUMENTS[0], evidence=[[["Scott"], []]])


def test_a_long_document_is_searched_once(monkeypatch):
    searched = []
    monkeypatch.setattr(
        windows_scaledown, "find_evidence", lambda text, words: searched.append(text) or find_evidence(text, words)
    )
    document = DOCUMENTS[1][0] * 10
    batch = build_processor().encode_documents(["Where?"], [[document]], evidence=[[["Cévennes"]]])
    assert searched == [document]
    assert batch["pointer_labels"].any(dim=1).sum() > 10


def test_a_tokenizer_that_does_not_know_its_characters_is_refused():
    processor = build_processor()
    processor.compressor_tokenizer.__class__ = type(
        "Slow", (type(processor.compressor_tokenizer),), {"is_fast": property(lambda self: False)}
    )
    with pytest.raises(ValueError, match=r"Slow, which does not say.*fast tokenizer"):
        windows_of(processor, "Herons stand.")
