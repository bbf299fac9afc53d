"""What answer returns and is given: documents read, conversations, system prompts, arrays, filled prompts."""

import pickle

import numpy as np
import pytest
import torch
from transformers import StoppingCriteria, TextGenerationPipeline

import filling_scaledown
import processing_scaledown
from scaledown import ScaleDownModel, ScaleDownProcessor
from scaledown.evaluation.systems import selection_of
from tiny import CHAT_TEMPLATE, DOCUMENTS, QUESTIONS, build_config, build_model, build_tokenizer

SHORT = {"max_new_tokens": 6}
TURNS = [{"role": "user", "content": "Hello </s> <|end|>!"}, {"role": "assistant", "content": "Good morning."}]
QUESTION = {"role": "user", "content": QUESTIONS[0]}


def test_one_object_says_what_was_read(model):
    output = model.answer(QUESTIONS, DOCUMENTS, return_reranking_scores=True, max_documents=1, **SHORT)
    answers, scores = output
    assert answers == output.answers == model.answer(QUESTIONS, DOCUMENTS, max_documents=1, **SHORT)
    assert scores == output.reranking_scores
    assert output.documents_read == [[int(np.argmax(row))] for row in scores]
    for question, documents, read, length, answer, written in zip(
        QUESTIONS, DOCUMENTS, output.documents_read, output.prompt_tokens, answers, output.answer_tokens, strict=True
    ):
        batch = model.processor(question, [documents[i] for i in read])
        assert length == batch["input_ids"].shape[1]
        assert model.answer(question, [documents[i] for i in read], **SHORT) == answer
        assert 0 <= written <= 6
    assert pickle.loads(pickle.dumps(output)).documents_read == output.documents_read
    single = model.answer(QUESTIONS[0], DOCUMENTS[0], return_reranking_scores=True, **SHORT)
    assert single.documents_read == [0, 1]
    assert isinstance(single.prompt_tokens, int)
    assert single == (answers_of_one := model.answer(QUESTIONS[0], DOCUMENTS[0], **SHORT), single.reranking_scores)
    assert single.answers == answers_of_one
    several = model.answer(
        QUESTIONS[0], DOCUMENTS[0], return_reranking_scores=True, num_beams=2, num_return_sequences=2, **SHORT
    )
    assert len(several.answers) == len(several.answer_tokens) == 2
    assert several.documents_read == [0, 1]


class EndsSomewhere(StoppingCriteria):
    """Ends a row as a stop string does: without an end token."""

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] % 4 == 0


def test_padding_behind_an_answer_that_was_stopped_is_not_counted(model):
    settings = {"max_new_tokens": 12, "stopping_criteria": [EndsSomewhere()], "return_reranking_scores": True}
    together = model.answer(QUESTIONS, DOCUMENTS, **settings)
    alone = [model.answer(*pair, **settings) for pair in zip(QUESTIONS, DOCUMENTS, strict=True)]
    assert together.answer_tokens == [output.answer_tokens for output in alone]
    assert len(set(together.answer_tokens)) > 1  # or nothing is padded


@pytest.mark.parametrize("number", [0, "2"])
def test_a_number_of_documents_that_was_assigned_is_checked(number):
    model = build_model()
    model.config.max_documents = number
    with pytest.raises(ValueError, match=f"max_documents={number!r} must be a whole number of at least 1"):
        model.answer(QUESTIONS, DOCUMENTS, **SHORT)
    with pytest.raises(ValueError, match=f"max_documents={number!r} must be a whole number of at least 1"):
        selection_of(model.config, {})


def test_answering_from_nothing_is_told(model, monkeypatch):
    warnings = []
    monkeypatch.setattr(filling_scaledown.logger, "warning_once", warnings.append)
    output = model.answer(QUESTIONS, DOCUMENTS, min_reranking_score=1e9, return_reranking_scores=True, **SHORT)
    assert output.documents_read == [[], [], []]
    assert output.answers == model.answer(QUESTIONS, **SHORT)
    assert len(warnings) == 3
    assert "questions[2] is answered without documents: none of its 3 is left" in warnings[2]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("closed_book", [True, False])
def test_earlier_turns_and_the_system_prompt_are_shown_as_text(chat, closed_book):
    model = build_model("n_layers")
    model.processor = ScaleDownProcessor.from_config(model.config, build_tokenizer(chat))
    processor = model.processor
    system = {"role": "system", "content": "Be short."}
    documents = [] if closed_book else DOCUMENTS[0]
    plain = processor(QUESTIONS[0], documents)
    batch = processor([system, *TURNS, QUESTION], documents)
    if not closed_book:
        assert torch.equal(batch["compressor_input_ids"], plain["compressor_input_ids"])
    text = processor.tokenizer.decode(batch["input_ids"][0][~batch["slot_mask"][0].bool()])
    user = f"Question: {QUESTIONS[0]}" if closed_book else f"Background:\n{{}}\n\nQuestion: {QUESTIONS[0]}"
    user = user.format("\n" if not closed_book else "")
    if chat:
        expected = (
            "<s><|system|>\nBe short.<|end|>\n<|user|>\nHello </s> <|end|>!<|end|>\n<|assistant|>\nGood "
            f"morning.<|end|>\n<|user|>\n{user}<|end|>\n<|assistant|>\n"
        )
        control = processor.tokenizer.convert_tokens_to_ids("<|end|>")
        assert int((batch["input_ids"] == control).sum()) == 4  # that of the user is text
    else:
        expected = f"<s>Be short.\n\nHello </s> <|end|>!\n\nAnswer:\nGood morning.\n\n{user}\n\nAnswer:\n"
    assert text == expected
    assert torch.equal(processor([QUESTION], documents)["input_ids"], plain["input_ids"])
    short = processor(QUESTIONS[0], documents, system_prompt="Be short.")
    assert torch.equal(processor([system, QUESTION], documents)["input_ids"], short["input_ids"])
    same = processor(QUESTIONS[0], documents, system_prompt=processor.system_prompt)
    assert torch.equal(same["input_ids"], plain["input_ids"])


def test_conversations_are_answered_alone_and_beside_questions(model):
    talk = [*TURNS, QUESTION]
    alone = model.answer(talk, DOCUMENTS[0], **SHORT)
    assert isinstance(alone, str)
    assert model.answer([QUESTIONS[1], talk], [DOCUMENTS[1], DOCUMENTS[0]], batch_size=1, **SHORT) == [
        model.answer(QUESTIONS[1], DOCUMENTS[1], **SHORT),
        alone,
    ]
    assert isinstance(model.answer(QUESTIONS[0], DOCUMENTS[0], system_prompt="Be short.", **SHORT), str)


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ([*TURNS], "roles user, assistant; expected .* the user's question at the end"),
        ([QUESTION, {"role": "system", "content": "x"}, QUESTION], "one system message at most"),
        ([{"role": "tool", "content": "x"}, QUESTION], r"questions\[0\] is .* expected a message with a role"),
        ([{"role": "user", "content": " "}], "a text as its content"),
        ([{"role": "system", "content": "</s>"}, QUESTION], "spells the special token </s>"),
    ],
)
def test_what_is_no_conversation_is_refused(question, message, model):
    with pytest.raises(ValueError, match=message):
        model.answer(question, DOCUMENTS[0])


@pytest.mark.parametrize("prompt", [3, ["Be brief."], {"role": "system"}])
def test_a_system_prompt_is_one_text(prompt, model):
    with pytest.raises(ValueError, match=r"system_prompt=.* must be a string\. A question with one of its own"):
        model.answer(QUESTIONS, DOCUMENTS, system_prompt=prompt)


def test_a_template_that_refuses_turns_says_so():
    config = build_config("n_layers")
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% if messages | length > 2 %}{{ raise_exception('One turn only') }}{% endif %}" + CHAT_TEMPLATE
    )
    processor = ScaleDownProcessor.from_config(config, tokenizer)
    processor(QUESTIONS[0], DOCUMENTS[0])
    with pytest.raises(ValueError, match="refuses the turns user, assistant, user: One turn only"):
        processor([*TURNS, QUESTION], DOCUMENTS[0])


def lists(kind: str, values):
    if kind == "array":
        nested = isinstance(values[0], list)
        return np.array([np.array(row) for row in values] if nested else values, dtype=object if nested else None)
    if kind == "generator":
        return (lists(kind, value) if isinstance(value, list) else value for value in values)
    return tuple(lists(kind, value) if isinstance(value, list) else value for value in values)


@pytest.mark.parametrize("kind", ["array", "generator", "tuple"])
def test_arrays_and_generators_are_taken_as_lists_are(kind, model):
    few = DOCUMENTS[0]
    calls = {
        "answer": lambda of: model.answer(of(QUESTIONS), of(DOCUMENTS), **SHORT),
        "answer one": lambda of: model.answer(QUESTIONS[0], of(few), **SHORT),
        "rank": lambda of: model.rank(QUESTIONS[0], of(few), return_documents=True),
        "compress": lambda of: model.compress(of(QUESTIONS), of(DOCUMENTS)).memory_embeddings.tolist(),
        "from text": lambda of: model.generate_from_text(of(QUESTIONS), of(DOCUMENTS), max_new_tokens=4),
        "documents": lambda of: model.compress_documents(of(few), of(QUESTIONS[:2])).tolist(),
        "compressed": lambda of: model.generate_from_compressed_documents_and_questions(
            of(QUESTIONS[:2]), model.compress_documents(few, QUESTIONS[:2]), max_new_tokens=4
        ),
        "processor": lambda of: model.processor(of(QUESTIONS), of(DOCUMENTS), of(QUESTIONS))["labels"].tolist(),
        "embeddings": lambda of: model.prompt_embeddings(of(QUESTIONS), of(DOCUMENTS))[0].tolist(),
    }
    for name, call in calls.items():
        assert call(lambda values: lists(kind, values)) == call(lambda values: values), name


@torch.no_grad()
def test_prompt_embeddings_are_what_answer_reads(model):
    for selection in ({}, {"max_documents": 1}):
        embeds, mask = model.prompt_embeddings(QUESTIONS, DOCUMENTS, **selection)
        tokens = model.generator.generate(
            inputs_embeds=embeds, attention_mask=mask, pad_token_id=2, do_sample=False, **SHORT
        )
        expected = model.answer(QUESTIONS, DOCUMENTS, **selection, **SHORT)
        assert model.processor.decode_answers(tokens) == expected
    embeds, mask = model.prompt_embeddings(QUESTIONS[0])
    assert embeds.shape == (*mask.shape, 32)


def test_stop_strings_need_no_tokenizer(model):
    answer = model.answer(QUESTIONS[0], DOCUMENTS[0], max_new_tokens=12)
    stop = answer[len(answer) // 2]
    stopped = model.answer(QUESTIONS[0], DOCUMENTS[0], max_new_tokens=12, stop_strings=[stop])
    assert answer.startswith(stopped)
    assert stopped.index(stop) >= len(stopped) - 4
    batch = model.processor(QUESTIONS[0], DOCUMENTS[0])
    tokens = model.generate(**batch, max_new_tokens=12, stop_strings=[stop])
    assert model.processor.decode_answers(tokens, batch["input_ids"].shape[1]) == [stopped]


def test_a_pipeline_of_plain_text_is_refused(model):
    pipe = TextGenerationPipeline(model=model, tokenizer=model.processor.tokenizer)
    with pytest.raises(ValueError, match=r"no document would be read: pipelines.*model\.answer"):
        pipe(QUESTIONS[0])


def test_embeddings_of_a_model_without_reranking():
    model: ScaleDownModel = build_model("n_layers", enable_reranking=False)
    with pytest.raises(ValueError, match="enable_reranking=False"):
        model.prompt_embeddings(QUESTIONS, DOCUMENTS, max_documents=1)


def test_a_system_prompt_is_checked_at_once(monkeypatch):
    model, asked = build_model("n_layers"), []
    find = processing_scaledown.control_ids
    monkeypatch.setattr(processing_scaledown, "control_ids", lambda tokenizer: asked.append(1) or find(tokenizer))
    model.processor.conversations(QUESTION["content"], "Answer in as few words as you can. " * 20)
    assert len(asked) == 1  # each takes milliseconds where a tokenizer has a thousand special tokens
