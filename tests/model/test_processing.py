"""The processor: text in, slots and chunks out, the same prompt for training and inference."""

import copy
import itertools
import math
import sys
import threading

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from configuration_scaledown import DEFAULT_SYSTEM_PROMPT, DEFAULT_USER_PROMPT
from rows_scaledown import _split_evenly
from scaledown import ScaleDownProcessor
from text_scaledown import _encode_without_added_tokens, control_ids
from tiny import ANSWERS, CHAT_TEMPLATE, DOCUMENTS, QUESTIONS, build_config, build_tokenizer
from tiny_tokenizers import build_unigram, build_wordpiece

LONG_DOCUMENT = " ".join(f"Sentence {i} of the survey names the river {i * 7919 % 101}." for i in range(12))


def build_processor(pair: bool = False, chat: bool = True, **kwargs) -> ScaleDownProcessor:
    config = build_config("modernbert" if pair else "n_layers", **kwargs)
    return ScaleDownProcessor.from_config(
        config, build_tokenizer(chat=chat), build_tokenizer(pair=True) if pair else None
    )


@pytest.fixture(scope="module", params=[False, True], ids=["causal", "pair"])
def processor(request):
    """One for compressors that share the generator's tokenizer, one for encoders; read-only."""
    return build_processor(pair=request.param)


def rows(ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    return [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]


def prompts(batch: dict) -> list[list[int]]:
    return rows(batch["input_ids"], batch["attention_mask"])


def chunk_ids(processor: ScaleDownProcessor, question: str, batch: dict) -> list[list[int]]:
    """The document's own ids in every chunk: what is between the query and the end of the frame."""
    tokenizer = processor.compressor_tokenizer
    query = tokenizer(question, add_special_tokens=False)["input_ids"][: processor.max_query_length]
    ends = 1 if tokenizer.sep_token_id is not None else 0
    start = 1 + len(query) + 1  # the frame's first token, and [SEP] or a line end
    chunks = rows(batch["compressor_input_ids"], batch["compressor_attention_mask"])
    assert all(chunk[1 : 1 + len(query)] == query for chunk in chunks)
    return [chunk[start : len(chunk) - ends] for chunk in chunks]


# -- shapes -----------------------------------------------------------------------------------------------------------


def test_a_batch_has_the_documented_keys_and_shapes(processor):
    batch = processor(QUESTIONS, DOCUMENTS, ANSWERS, reranking_scores=[[1.0, 2.0], None, [3, 4.5, -6]])
    assert list(batch) == [
        "input_ids",
        "attention_mask",
        "slot_mask",
        "labels",
        "compressor_input_ids",
        "compressor_attention_mask",
        "compressor_document_mask",
        "chunk_slots",
        "chunk_to_document",
        "document_to_example",
        "reranking_labels",
    ]
    assert set(batch) == set(processor.model_input_names) - {"compressor_windows", "pointer_labels"}
    shape = batch["input_ids"].shape
    assert shape[0] == 3
    assert batch["attention_mask"].shape == batch["slot_mask"].shape == batch["labels"].shape == shape
    num_chunks = batch["compressor_input_ids"].shape[0]
    assert batch["compressor_attention_mask"].shape == batch["compressor_input_ids"].shape
    assert batch["chunk_slots"].shape == batch["chunk_to_document"].shape == (num_chunks,)
    assert batch["document_to_example"].tolist() == [0, 0, 1, 2, 2, 2]
    assert batch["slot_mask"].dtype == torch.bool
    torch.testing.assert_close(
        batch["reranking_labels"], torch.tensor([1.0, 2.0, math.nan, 3.0, 4.5, -6.0]), equal_nan=True
    )


def test_every_prompt_has_the_slots_of_its_own_chunks(processor):
    batch = processor(QUESTIONS, DOCUMENTS)
    per_document = torch.zeros(6).long().index_add(0, batch["chunk_to_document"], batch["chunk_slots"])
    expected = torch.zeros(3).long().index_add(0, batch["document_to_example"], per_document)
    assert batch["slot_mask"].sum(dim=1).tolist() == expected.tolist()
    assert not (batch["slot_mask"] & ~batch["attention_mask"].bool()).any()


def test_one_question_needs_no_list(processor):
    single = processor(QUESTIONS[0], DOCUMENTS[0], ANSWERS[0], reranking_scores=[0.5, 0.25])
    listed = processor(QUESTIONS[:1], DOCUMENTS[:1], ANSWERS[:1], reranking_scores=[[0.5, 0.25]])
    assert list(single) == list(listed)
    assert all(torch.equal(single[name], listed[name]) for name in listed)


def test_prompts_are_padded_left_and_chunks_right(processor):
    batch = processor(QUESTIONS, DOCUMENTS, ANSWERS)
    mask = batch["attention_mask"]
    assert (mask.sum(dim=1) < mask.shape[1]).any()
    assert (mask.diff(dim=1) >= 0).all()
    assert (batch["labels"][mask == 0] == -100).all()
    chunk_mask = batch["compressor_attention_mask"]
    assert (chunk_mask.sum(dim=1) < chunk_mask.shape[1]).any()
    assert (chunk_mask.diff(dim=1) <= 0).all()
    # To the longest of the batch, not to a maximum.
    assert mask.sum(dim=1).max() == mask.shape[1]
    assert chunk_mask.sum(dim=1).max() == chunk_mask.shape[1]


def test_a_batch_is_its_examples_one_by_one(processor):
    batch = processor(QUESTIONS, DOCUMENTS, ANSWERS)
    chunks = rows(batch["compressor_input_ids"], batch["compressor_attention_mask"])
    alone = [processor(*example) for example in zip(QUESTIONS, DOCUMENTS, ANSWERS, strict=True)]
    assert prompts(batch) == [prompts(part)[0] for part in alone]
    assert chunks == [
        chunk for part in alone for chunk in rows(part["compressor_input_ids"], part["compressor_attention_mask"])
    ]
    assert rows(batch["labels"], batch["attention_mask"]) == [
        rows(part["labels"], part["attention_mask"])[0] for part in alone
    ]


def test_only_pytorch_tensors_are_built(processor):
    with pytest.raises(ValueError, match="return_tensors='np' is not supported"):
        processor(QUESTIONS[0], DOCUMENTS[0], return_tensors="np")


# -- chunks and slots -------------------------------------------------------------------------------------------------


def test_a_long_document_is_cut_evenly_in_order_and_whole(processor):
    documents = ["Short.", LONG_DOCUMENT]
    batch = processor(QUESTIONS[0], documents)
    assert batch["chunk_to_document"].tolist() == [0] + [1] * (len(batch["chunk_slots"]) - 1)
    first, *chunks = chunk_ids(processor, QUESTIONS[0], batch)
    encoded = processor.compressor_tokenizer(documents, add_special_tokens=False)["input_ids"]
    assert [first, list(itertools.chain(*chunks))] == encoded
    lengths = [len(chunk) for chunk in chunks]
    assert len(lengths) == math.ceil(len(encoded[1]) / 32) > 3
    assert max(lengths) - min(lengths) <= 1
    assert max(lengths) <= 32


@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 65, 97, 1000])
def test_splitting_uses_the_fewest_chunks_of_equal_length(length):
    chunks = _split_evenly(list(range(length)), 32)
    assert list(itertools.chain(*chunks)) == list(range(length))
    assert len(chunks) == math.ceil(length / 32)
    assert max(map(len, chunks)) <= 32
    assert max(map(len, chunks)) - min(map(len, chunks)) <= 1


@pytest.mark.parametrize(
    ("rate", "tokens"), [(None, None), (1, None), (2, None), (4, 2), (16, None), (32, None), (None, 1), (3, 3)]
)
def test_rate_and_limit_of_a_call_decide_the_slots(processor, rate, tokens):
    batch = processor(QUESTIONS, DOCUMENTS, compression_rate=rate, num_memory_tokens=tokens)
    per_question = [chunk_ids(processor, q, processor(q, d)) for q, d in zip(QUESTIONS, DOCUMENTS, strict=True)]
    lengths = [len(chunk) for chunks in per_question for chunk in chunks]
    rate, limit = rate or 8, tokens or 4
    expected = [min(math.ceil(length / rate), limit) for length in lengths]
    assert batch["chunk_slots"].tolist() == expected
    assert batch["slot_mask"].sum() == sum(expected)


def test_the_rate_really_changes_the_number_of_slots(processor):
    counts = [int(processor(QUESTIONS, DOCUMENTS, compression_rate=rate)["slot_mask"].sum()) for rate in (8, 16, 32)]
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) == 3


@pytest.mark.parametrize("rate", [0, -1, 33, 8.0, True, "8"])
def test_a_rate_out_of_range_is_refused(processor, rate):
    with pytest.raises(ValueError, match=f"compression_rate={rate!r} must be a whole number from 1 to chunk_length=32"):
        processor(QUESTIONS, DOCUMENTS, compression_rate=rate)


@pytest.mark.parametrize("tokens", [0, 5, 2.0, True])
def test_more_memory_tokens_than_the_model_has_are_refused(processor, tokens):
    with pytest.raises(ValueError, match=f"num_memory_tokens={tokens!r} must be a whole number from 1 to 4"):
        processor(QUESTIONS, DOCUMENTS, num_memory_tokens=tokens)


def test_a_rate_the_model_cannot_reach_is_said_aloud(caplog):
    build_processor()(QUESTIONS[0], DOCUMENTS[0], compression_rate=2)
    assert "asks for 16 slots per full chunk; this model has 4" in caplog.text


def test_a_long_question_does_not_eat_the_documents_budget(processor):
    long = "Tell me, in your own words, " * 8 + "who wrote Ivanhoe?"
    short = "Who wrote Ivanhoe?"
    first, second = processor(long, [LONG_DOCUMENT]), processor(short, [LONG_DOCUMENT])
    assert chunk_ids(processor, long, first) == chunk_ids(processor, short, second)
    assert first["chunk_slots"].tolist() == second["chunk_slots"].tolist()
    # The generator reads all of it.
    tokenizer = processor.tokenizer
    assert long in tokenizer.decode(prompts(first)[0])


def test_an_empty_query_compresses_for_no_question_in_particular(processor):
    batch = processor.encode_documents([""], [["A document."]])
    row = rows(batch["compressor_input_ids"], batch["compressor_attention_mask"])[0]
    tokenizer = processor.compressor_tokenizer
    expected = tokenizer("A document.")["input_ids"]
    assert row == expected


def test_an_encoder_sees_the_pair_it_was_pretrained_on():
    processor = build_processor(pair=True)
    batch = processor("Who?", ["A document."])
    row = rows(batch["compressor_input_ids"], batch["compressor_attention_mask"])[0]
    assert row == processor.compressor_tokenizer("Who?", "A document.")["input_ids"]


# -- the prompt -------------------------------------------------------------------------------------------------------


def expected_prompt(processor: ScaleDownProcessor, documents_text: str, question: str) -> str:
    messages = [
        {"role": "system", "content": processor.system_prompt},
        {"role": "user", "content": f"Background:\n{documents_text}\n\nQuestion: {question}"},
    ]
    return processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def spelled(processor: ScaleDownProcessor, batch: dict, index: int = 0) -> str:
    """The prompt as text, each run of slots as `#` signs."""
    keep = batch["attention_mask"][index].bool()
    ids, slots = batch["input_ids"][index][keep].tolist(), batch["slot_mask"][index][keep].tolist()
    text = ""
    for is_slot, run in itertools.groupby(zip(ids, slots, strict=True), key=lambda pair: pair[1]):
        run = [token_id for token_id, _ in run]
        text += "#" * len(run) if is_slot else processor.tokenizer.decode(run)
    return text


def test_the_prompt_is_the_papers_in_the_chat_template(processor):
    batch = processor(QUESTIONS, DOCUMENTS)
    slots = batch["chunk_slots"].tolist()
    assert batch["chunk_to_document"].tolist()[:2] == [0, 1]
    text = expected_prompt(processor, "#" * slots[0] + "\n" + "#" * slots[1], QUESTIONS[0])
    assert spelled(processor, batch) == text
    # A long document's chunks follow each other without a separator.
    assert "#" * sum(slots[2:-3]) in spelled(processor, batch, 1)


def test_a_template_without_a_system_role_gets_the_system_prompt_in_the_users_turn():
    tokenizer = copy.deepcopy(build_tokenizer())
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + CHAT_TEMPLATE
    )
    processor = ScaleDownProcessor.from_config(build_config("n_layers"), tokenizer)
    batch = processor(QUESTIONS[0], DOCUMENTS[0][:1])
    slots = "#" * int(batch["slot_mask"].sum())
    assert spelled(processor, batch) == (
        f"<s><|user|>\nAnswer.\n\nBackground:\n{slots}\n\nQuestion: {QUESTIONS[0]}<|end|>\n<|assistant|>\n"
    )


def test_without_a_chat_template_the_prompt_is_plain_and_begins_as_a_text_does():
    processor = build_processor(chat=False)
    batch = processor([QUESTIONS[0], QUESTIONS[1]], [DOCUMENTS[0][:1], []])
    slots = "#" * int(batch["slot_mask"].sum())
    assert spelled(processor, batch) == f"<s>Answer.\n\nBackground:\n{slots}\n\nQuestion: {QUESTIONS[0]}\n\nAnswer:\n"
    assert spelled(processor, batch, 1) == f"<s>Answer.\n\nQuestion: {QUESTIONS[1]}\n\nAnswer:\n"


def test_a_template_that_loses_or_doubles_the_message_is_refused():
    for template in ("{{ bos_token }}", CHAT_TEMPLATE + CHAT_TEMPLATE):
        tokenizer = copy.deepcopy(build_tokenizer())
        tokenizer.chat_template = template
        processor = ScaleDownProcessor.from_config(build_config("n_layers"), tokenizer)
        with pytest.raises(ValueError, match="does not repeat the user's message exactly once"):
            processor(QUESTIONS[0], DOCUMENTS[0])


def test_the_question_keeps_the_tokens_it_has_in_running_text(processor):
    question = "novel of whom?"
    tokenizer = processor.tokenizer
    running = tokenizer(f" {question}", add_special_tokens=False)["input_ids"]
    # One token with its space, another word without.
    assert running != [*tokenizer(" ")["input_ids"][1:], *tokenizer(question, add_special_tokens=False)["input_ids"]]
    ids = prompts(processor(question, DOCUMENTS[0]))[0]
    assert any(ids[i : i + len(running)] == running for i in range(len(ids)))


@pytest.mark.parametrize("chat", [True, False])
def test_training_and_inference_see_the_same_prompt(chat):
    processor = build_processor(chat=chat)
    questions, documents = [*QUESTIONS, "Alone?"], [*DOCUMENTS, []]
    asked, learned = processor(questions, documents), processor(questions, documents, [*ANSWERS, "No."])
    labels = rows(learned["labels"], learned["attention_mask"])
    for prompt, row, label in zip(prompts(asked), prompts(learned), labels, strict=True):
        answer = row[len(prompt) :]
        assert row[: len(prompt)] == prompt
        assert label == [-100] * len(prompt) + answer
        assert answer[-1] == processor.tokenizer.eos_token_id
    assert asked["slot_mask"].sum(dim=1).tolist() == learned["slot_mask"].sum(dim=1).tolist()
    learned_text = [processor.tokenizer.decode([i for i in label if i != -100][:-1]) for label in labels]
    assert learned_text == [*ANSWERS, "No."]


def test_the_end_is_learned_even_where_padding_looks_the_same():
    tokenizer = copy.deepcopy(build_tokenizer())
    tokenizer.pad_token = None
    processor = ScaleDownProcessor.from_config(build_config("n_layers"), tokenizer)
    batch = processor(QUESTIONS, DOCUMENTS, ANSWERS)
    assert (batch["input_ids"][batch["attention_mask"] == 0] == tokenizer.eos_token_id).all()
    assert (batch["labels"][:, -1] == tokenizer.eos_token_id).all()
    assert (batch["labels"] == tokenizer.eos_token_id).sum() == 3


def test_a_long_answer_is_cut(processor):
    batch = processor(QUESTIONS[0], DOCUMENTS[0], "word " * 100, max_answer_length=7)
    whole = processor(QUESTIONS[0], DOCUMENTS[0], "word " * 100)
    assert (batch["labels"] != -100).sum() == 7
    assert (whole["labels"] != -100).sum() == 128
    for length in (-1, 0, 1):
        with pytest.raises(ValueError, match=f"max_answer_length={length} must be at least 2"):
            processor(QUESTIONS[0], DOCUMENTS[0], "word", max_answer_length=length)


def test_a_question_without_documents_gets_the_closed_book_prompt(processor):
    for documents in (None, []):
        batch = processor(QUESTIONS[0], documents)
        assert set(batch) == {"input_ids", "attention_mask", "slot_mask"}
        assert not batch["slot_mask"].any()
        assert spelled(processor, batch) == (
            f"<s><|system|>\nAnswer.<|end|>\n<|user|>\nQuestion: {QUESTIONS[0]}<|end|>\n<|assistant|>\n"
        )
    mixed = processor(QUESTIONS, [DOCUMENTS[0], [], DOCUMENTS[2]])
    assert mixed["document_to_example"].tolist() == [0, 0, 2, 2, 2]
    assert mixed["slot_mask"].any(dim=1).tolist() == [True, False, True]


def test_the_filler_of_a_slot_is_not_the_end_token(processor):
    batch = processor(QUESTIONS, DOCUMENTS)
    assert not (batch["input_ids"][batch["slot_mask"]] == processor.tokenizer.eos_token_id).any()


def test_a_tokenizer_without_an_end_is_refused():
    tokenizer = copy.deepcopy(build_tokenizer())
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"no end token.*Set tokenizer\.eos_token"):
        ScaleDownProcessor(tokenizer)


def test_the_given_tokenizer_is_left_as_it_is():
    tokenizer = copy.deepcopy(build_tokenizer())
    before = tokenizer("A <s> word", add_special_tokens=True)["input_ids"]
    processor = ScaleDownProcessor(tokenizer)
    processor(QUESTIONS, DOCUMENTS, ANSWERS)
    assert processor.tokenizer is tokenizer
    assert processor.compressor_tokenizer is not tokenizer
    assert tokenizer("A <s> word", add_special_tokens=True)["input_ids"] == before
    assert tokenizer.padding_side == build_tokenizer().padding_side


def test_answers_are_decoded_without_special_tokens_and_space(processor):
    ids = processor.tokenizer("  Walter Scott \n", add_special_tokens=False)["input_ids"]
    prompt = [0, 5, 6]
    sequences = torch.tensor([prompt + ids + [1, 2, 2], prompt + [1] + [2] * (len(ids) + 2)])
    assert processor.decode_answers(sequences, prompt_length=3) == ["Walter Scott", ""]


# -- what is refused --------------------------------------------------------------------------------------------------

WRONG_TEXTS = [
    ((None, []), TypeError, "questions must be a string or a list of strings, got NoneType"),
    (([], []), ValueError, "questions is empty"),
    (("Who?", "One text."), TypeError, r"documents is one string \('One text\.'…\)"),
    ((["Who?"], "One text."), TypeError, r"documents is one string"),
    (("Who?", [["a", "b"]]), TypeError, r"documents\[0\] is a list"),
    (("Who?", {"a": 1}), TypeError, "documents must be a list, got dict"),
    ((["Who?", "What?"], [["a"]]), ValueError, "2 questions but 1 lists of documents"),
    ((["Who?"], [["a"], ["b"]]), ValueError, "1 questions but 2 lists of documents"),
    ((["Who?", "What?"], [["a"], "b"]), TypeError, r"documents\[1\] is a string"),
    ((["Who?", "What?"], [["a"], None]), TypeError, r"documents\[1\] is NoneType"),
    ((["Who?", 5], [["a"], ["b"]]), TypeError, r"questions\[1\] is int"),
    ((["Who?", ""], [["a"], ["b"]]), ValueError, r"questions\[1\] is empty"),
    ((["Who?", " \t\n"], [["a"], ["b"]]), ValueError, r"questions\[1\] is empty"),
    ((["Who?", "What?"], [["a"], ["b", ""]]), ValueError, r"documents\[1\]\[1\] is empty"),
    ((["Who?", "What?"], [["a"], ["b", " \u2003\n"]]), ValueError, r"documents\[1\]\[1\] is empty"),
    ((["Who?", "What?"], [["a"], ["b", None]]), TypeError, r"documents\[1\]\[1\] is NoneType"),
    ((["Who?", "What?"], [["a"], ["b", {"text": "c"}]]), TypeError, r"documents\[1\]\[1\] is dict"),
    (("Who?", ["a", 7]), TypeError, r"documents\[0\]\[1\] is int"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG_TEXTS)
def test_what_is_not_text_is_refused_by_its_index(processor, arguments, error, message):
    with pytest.raises(error, match=message):
        processor(*arguments)


def test_a_document_without_a_single_token_is_refused():
    tokenizer = build_wordpiece(unknown=False)
    processor = ScaleDownProcessor(build_tokenizer(), tokenizer, chunk_length=32, num_memory_tokens=4)
    with pytest.raises(ValueError, match=r"documents\[1\]\[0\] has no token"):
        processor(["Who?", "What?"], [["river"], ["\u200b\u00ad"]])


@pytest.mark.parametrize(
    ("answers", "error", "message"),
    [
        (["a", "b"], ValueError, "3 questions but 2 answers"),
        ("a", ValueError, "3 questions but 1 answers"),
        (["a", "", "c"], ValueError, r"answers\[1\] is ''"),
        (["a", "b", None], ValueError, r"answers\[2\] is None"),
        (5, TypeError, "answers must be a string or a list of strings, got int"),
    ],
)
def test_wrong_answers_are_refused(processor, answers, error, message):
    with pytest.raises(error, match=message):
        processor(QUESTIONS, DOCUMENTS, answers)


@pytest.mark.parametrize(
    ("scores", "error", "message"),
    [
        ([[1.0, 2.0], [3.0]], ValueError, "3 questions but 2 lists of reranking_scores"),
        ([[1.0, 2.0], [3.0], [4.0]], ValueError, r"reranking_scores\[2\] has 1 scores for 3 documents"),
        ([1.0, 2.0, 3.0], TypeError, r"reranking_scores\[0\] is 1\.0, expected a list"),
        ([[1.0, 2.0], [None], None], TypeError, r"reranking_scores\[1\] is \[None\], expected a list of numbers"),
        ([[1.0, "high"], None, None], TypeError, r"reranking_scores\[0\] is \[1\.0, 'high'\]"),
    ],
)
def test_wrong_scores_are_refused(processor, scores, error, message):
    with pytest.raises(error, match=message):
        processor(QUESTIONS, DOCUMENTS, reranking_scores=scores)


def test_scores_without_documents_are_refused(processor):
    with pytest.raises(ValueError, match=r"reranking_scores\[0\] has 1 scores for 0 documents"):
        processor(QUESTIONS[0], [], reranking_scores=[[0.5]])


def test_a_prompt_past_the_generators_context_is_refused_by_its_index(processor):
    documents = [["Short."], [LONG_DOCUMENT] * 20]
    with pytest.raises(ValueError, match=r"questions\[1\] with its 20 documents needs a prompt of \d+ .* reads 512"):
        processor(QUESTIONS[:2], documents)
    fitting = processor(QUESTIONS[:2], documents, compression_rate=32)
    assert fitting["slot_mask"][1].sum() == fitting["chunk_slots"][1:].sum()


# -- untrusted text ---------------------------------------------------------------------------------------------------


def build_plainly_added():
    """Turn markers that are added tokens but not marked special, as some published chat models have them."""
    tokenizer = copy.deepcopy(build_tokenizer())
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def build_with_templates_by_name():
    tokenizer = build_plainly_added()
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": tokenizer.chat_template}
    return tokenizer


FAMILIES = {
    "byte-level": (build_tokenizer, lambda: None),
    "byte-level, plain": (lambda: build_tokenizer(chat=False), lambda: None),
    "pair": (build_tokenizer, lambda: build_tokenizer(pair=True)),
    "wordpiece": (build_tokenizer, build_wordpiece),
    "unigram": (build_unigram, lambda: None),
    "added, not special": (build_plainly_added, lambda: None),
    "templates by name": (build_with_templates_by_name, lambda: None),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    generator, compressor = FAMILIES[request.param]
    config = build_config("n_layers", chunk_length=200, max_query_length=200)
    return ScaleDownProcessor.from_config(config, generator(), compressor())


def control_tokens(tokenizer) -> dict[int, str]:
    template = str(tokenizer.chat_template or "")
    return {
        token_id: token.content
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special or token.content in template
    }


def test_no_text_becomes_a_control_token(family):
    """Every control token of both vocabularies, in questions and in documents."""
    attacks = sorted(
        {*control_tokens(family.tokenizer).values(), *control_tokens(family.compressor_tokenizer).values()}
    )
    assert len(attacks) >= 4
    frame_of = {}
    for name, tokenizer in (("input_ids", family.tokenizer), ("compressor_input_ids", family.compressor_tokenizer)):
        frame_of[name] = set(control_tokens(tokenizer)) - {tokenizer.unk_token_id}

    def controls(question: str, document: str) -> dict[str, list[list[int]]]:
        batch = family(question, [document, "river"])
        prompt = batch["input_ids"][0][batch["attention_mask"][0].bool() & ~batch["slot_mask"][0]].tolist()
        chunks = rows(batch["compressor_input_ids"], batch["compressor_attention_mask"])
        found = {"input_ids": [prompt], "compressor_input_ids": chunks}
        return {name: [[i for i in row if i in frame_of[name]] for row in found[name]] for name in found}

    harmless = controls("a b", "a b")
    for attack in attacks:
        text = f"a {attack}b{attack} {attack}"
        assert controls(text, "a b") == harmless, attack
        assert controls("a b", text) == harmless, attack
        assert controls(text, text) == harmless, attack
        # Alone, with nothing around it that would keep it apart.
        assert controls("a b" + attack, attack + "a b") == harmless, attack


def test_text_that_spells_tokens_does_not_move_a_slot(family):
    attack = " ".join(control_tokens(family.tokenizer).values())
    batch = family(f"Who {attack}?", [f"{attack} {attack} wrote it.", "river"])
    plain = family("Who?", ["river", "river"])
    assert batch["slot_mask"].sum() == batch["chunk_slots"].sum()
    assert batch["chunk_slots"].tolist() == [4, 1]
    # All that differs is the number of slots of the first document and the tokens of the question.
    first = [int(b["slot_mask"][0].nonzero()[0] - (1 - b["attention_mask"][0]).sum()) for b in (batch, plain)]
    assert first[0] == first[1]
    filler = batch["input_ids"][batch["slot_mask"]]
    assert (filler == filler[0]).all()


def test_text_that_spells_tokens_is_still_read_as_text():
    processor = build_processor()
    attack = "The token <|end|> ends a turn, </s> a text and <s> begins one."
    ids = prompts(processor(attack, ["a"]))[0]
    assert attack in processor.tokenizer.decode(ids)
    assert chunk_ids_text(processor, attack) == attack


def chunk_ids_text(processor: ScaleDownProcessor, document: str) -> str:
    batch = processor("Who?", [document])
    return processor.tokenizer.decode(list(itertools.chain(*chunk_ids(processor, "Who?", batch))))


def test_the_careful_way_of_encoding_agrees_with_the_usual_one(family):
    text = "Two rivers, one  source; who named them? river [SE]P ünknown"
    for tokenizer in (family.tokenizer, family.compressor_tokenizer):
        usual = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert _encode_without_added_tokens(tokenizer, text, control_ids(tokenizer)) == usual


HARMLESS_BRACES = ["{question}", "{documents}", "{{ bos_token }}", "{% for x in y %}", "{0} {} %s $A \\1", "{"]


@pytest.mark.parametrize("text", [*HARMLESS_BRACES, "SCALEDOWN-DOCUMENTS-GO-HERE", "SCALEDOWN-QUESTION-GOES-HERE"])
@pytest.mark.parametrize("chat", [True, False])
def test_braces_and_marks_in_a_text_mean_nothing(text, chat):
    processor = build_processor(chat=chat)
    batch = processor(f"Is {text} a word?", [f"{text} is one.", text], f"{text}!")
    slots = ["#" * count for count in batch["chunk_slots"].tolist()]
    assert f"Background:\n{slots[0]}\n{slots[1]}\n\nQuestion: Is {text} a word?" in spelled(processor, batch)
    assert spelled(processor, batch).endswith(f"{text}!</s>")
    assert chunk_ids_text(processor, f"{text} is one.") == f"{text} is one."


def test_braces_of_the_settings_mean_nothing_but_the_two_fields():
    processor = build_processor(
        system_prompt="Answer {as} {{json}}.", user_prompt="{documents} {x} {question}", document_separator=" {sep} "
    )
    batch = processor("Who?", ["a", "b"])
    assert spelled(processor, batch) == (
        "<s><|system|>\nAnswer {as} {{json}}.<|end|>\n<|user|>\n# {sep} # {x} Who?<|end|>\n<|assistant|>\n"
    )


def test_no_separator_at_all_is_allowed():
    batch = build_processor(document_separator="")("Who?", ["a", "b"])
    positions = batch["slot_mask"][0].nonzero().flatten().tolist()
    assert positions == list(range(positions[0], positions[0] + 2))


def test_an_answer_past_the_context_is_refused(model):
    processor = copy.copy(model.processor)
    inference = processor(QUESTIONS[0], DOCUMENTS[0])["input_ids"].shape[1]
    processor.max_prompt_length = inference + 3
    processor(QUESTIONS[0], DOCUMENTS[0])
    with pytest.raises(ValueError, match=r"questions\[0\] .* and \d+ tokens of answer; the generator reads"):
        processor(QUESTIONS[0], DOCUMENTS[0], answers=ANSWERS[1])


# -- other people's tokenizers ----------------------------------------------------------------------------------------


def test_a_template_that_leaves_the_system_message_out_gets_it_in_the_users():
    tokenizer = copy.deepcopy(build_tokenizer())
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    )
    processor = ScaleDownProcessor(tokenizer, system_prompt="Be brief.", chunk_length=32, num_memory_tokens=4)
    text = tokenizer.decode(processor(QUESTIONS[0], DOCUMENTS[0])["input_ids"][0])
    assert "<|user|>Be brief.\n\nBackground:" in text


@pytest.mark.parametrize("legacy", [True, False])
def test_parts_of_a_prompt_are_encoded_as_one_text_by_tokenizers_that_mark_beginnings(legacy):
    """Llama's and Mistral's first tokenizers put a blank before every text they are given."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3}
    characters = sorted(set("".join(QUESTIONS) + DEFAULT_SYSTEM_PROMPT + DEFAULT_USER_PROMPT + "[INST]/\n▁:aA"))
    for text in (*characters, "▁▁", "Wh", "▁Wh", "[/", "▁[/"):
        vocabulary.setdefault(text, len(vocabulary))
    merges = [("▁", "▁"), ("W", "h"), ("▁", "Wh"), ("[", "/"), ("▁", "[/")]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}\n{% else %}"
        "[INST] {{ m['content'] }} [/INST]{% endif %}{% endfor %}"
    )
    processor = ScaleDownProcessor(tokenizer, chunk_length=32, num_memory_tokens=4)
    batch = processor.build_prompts(QUESTIONS[:1], [[]])
    messages = [
        {"role": "system", "content": DEFAULT_SYSTEM_PROMPT},
        {"role": "user", "content": f"Question: {QUESTIONS[0]}"},
    ]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert batch["input_ids"][0].tolist() == tokenizer(whole, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("where", ["question", "document"])
def test_half_a_surrogate_pair_is_named(processor, where):
    question, document = ("Who\ud800?", "A.") if where == "question" else ("Who?", "A\udc00")
    name = r"questions\[0\]" if where == "question" else r"documents\[0\]\[0\]"
    with pytest.raises(ValueError, match=f"{name} has half of a surrogate pair"):
        processor([question], [[document]])


def test_half_a_surrogate_pair_is_named_in_answers_and_conversations(processor):
    documents, turns = ["A."], [{"role": "user", "content": "Hi\ud800"}, {"role": "assistant", "content": "Yes."}]
    asked = [*turns, {"role": "user", "content": "Who?"}]
    with pytest.raises(ValueError, match=r"answers\[0\] has half of a surrogate pair"):
        processor("Who?", documents, answers="A\udc00")
    with pytest.raises(ValueError, match=r"questions\[0\]\[0\] has half of a surrogate pair"):
        processor([asked], [documents])
    with pytest.raises(ValueError, match="The system prompt has half of a surrogate pair"):
        processor.conversations("Who?", "Be brief.\ud800")


def test_a_question_that_is_too_long_by_itself_is_to_be_shortened(processor):
    processor = copy.copy(processor)
    processor.max_prompt_length = 40
    with pytest.raises(ValueError, match="Shorten the question"):
        processor("Who? " * 40)


# -- several threads, and values of other libraries -------------------------------------------------------------------


def test_a_prompt_is_the_same_while_other_threads_build_theirs(processor):
    expected, found = prompts(processor(QUESTIONS[0], DOCUMENTS[0])), []

    def build():
        found.extend(prompts(processor(QUESTIONS[0], DOCUMENTS[0])) for _ in range(60))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=build) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert len(found) == 240 and all(ids == expected for ids in found)


def test_columns_of_a_data_set_are_questions_and_documents(processor):
    data = Dataset.from_dict({"query": QUESTIONS, "documents": DOCUMENTS})
    expected = processor(QUESTIONS, DOCUMENTS)
    batch = processor(data["query"], data["documents"])
    assert prompts(batch) == prompts(expected)
    assert torch.equal(batch["compressor_input_ids"], expected["compressor_input_ids"])


@pytest.mark.parametrize(
    "scores",
    [
        np.array([1.5, -2.0], dtype=np.float32),
        list(np.array([1.5, -2.0], dtype=np.float32)),
        torch.tensor([1.5, -2.0]),
        (1.5, -2),
        [[1.5, -2.0]],
        [np.array([1.5, -2.0])],
    ],
)
def test_scores_may_be_what_a_teacher_returns(processor, scores):
    batch = processor(QUESTIONS[0], DOCUMENTS[0], reranking_scores=scores)
    assert batch["reranking_labels"].tolist() == [1.5, -2.0]


def test_whole_numbers_may_be_those_of_an_array(processor):
    batch = processor(QUESTIONS[0], DOCUMENTS[0], compression_rate=np.int64(4), num_memory_tokens=np.int64(2))
    expected = processor(QUESTIONS[0], DOCUMENTS[0], compression_rate=4, num_memory_tokens=2)
    assert torch.equal(batch["chunk_slots"], expected["chunk_slots"])
