"""Every way transformers decodes, on compressed documents, and the plain-text calls on top of it."""

import json
import os
import signal
import threading

import pytest
import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer
from transformers.generation import RepetitionPenaltyLogitsProcessor

from reranking_scaledown import document_scores
from scaledown import ScaleDownConfig, ScaleDownModel
from shortcuts_scaledown import CACHE_NAME
from tiny import DOCUMENTS, GENERATORS, LEARNED_POSITIONS, QUESTIONS, build_config, build_model, only

PROMPT = ("input_ids", "attention_mask", "slot_mask")
CHUNKS = ("compressor_input_ids", "compressor_attention_mask", "chunk_slots")
NEW_TOKENS = 8
GREEDY = {"do_sample": False, "max_new_tokens": NEW_TOKENS}
NO_END = {"suppress_tokens": [1]}


def batch_of(model, questions=QUESTIONS, documents=DOCUMENTS, **kwargs) -> dict[str, torch.Tensor]:
    return dict(model.processor(questions, documents, **kwargs))


def memory_of(model, batch: dict) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return only(model.get_memory_embeddings(**only(batch, *CHUNKS)), "memory_embeddings", "memory_mask")


def new_tokens(model, batch: dict, **kwargs) -> torch.Tensor:
    torch.manual_seed(1)
    sequences = model.generate(**batch, **kwargs)
    length = batch["input_ids"].shape[1]
    repeated = kwargs.get("num_return_sequences", 1)
    assert torch.equal(sequences[:, :length], batch["input_ids"].repeat_interleave(repeated, dim=0))
    return sequences[:, length:]


def without_padding(row: torch.Tensor) -> list[int]:
    return [token_id for token_id in row.tolist() if token_id != 2]


def count_compressions(model, call) -> int:
    calls = []
    hook = model.compressor.register_forward_hook(lambda *_: calls.append(1))
    call()
    hook.remove()
    return len(calls)


# -- modes ------------------------------------------------------------------------------------------------------------

MODES = {
    "greedy": {},
    "greedy, no cache": {"use_cache": False},
    "greedy, static cache": {"cache_implementation": "static"},
    "greedy, prefill in pieces": {"prefill_chunk_size": 16},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9},
    "sampling, several": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5},
    "beams, no cache": {"num_beams": 3, "num_return_sequences": 2, "use_cache": False},
    "beams, static cache": {"num_beams": 2, "cache_implementation": "static"},
    "beam sampling": {"num_beams": 3, "num_return_sequences": 2, "do_sample": True},
    "least length": {"min_new_tokens": 3},
}


# How a prompt is decoded does not depend on the kind of compressor that filled it.
EVERY_KIND = ("greedy", "beams")
KINDS_AND_MODES = [
    pytest.param(kind, mode, marks=[] if kind == "n_layers" or mode in EVERY_KIND else pytest.mark.slow)
    for kind in ("n_layers", "modernbert", "llm")
    for mode in MODES
]


@pytest.mark.parametrize(("any_model", "mode"), KINDS_AND_MODES, indirect=["any_model"])
@torch.no_grad()
def test_every_mode_equals_the_generators_own_on_the_filled_prompt(any_model, mode):
    """The generator alone, given the prompt's embeddings with slots filled by hand, must write the same tokens."""
    batch = batch_of(any_model)
    settings = {**GREEDY, **NO_END, **MODES[mode]}
    memory = memory_of(any_model, batch)
    embeds = any_model.generator.get_input_embeddings()(batch["input_ids"])
    embeds[batch["slot_mask"]] = memory["memory_embeddings"][memory["memory_mask"]]
    plain = {k: v for k, v in settings.items() if k not in ("use_cache", "cache_implementation", "prefill_chunk_size")}
    torch.manual_seed(1)
    expected = any_model.generator.generate(
        inputs_embeds=embeds, attention_mask=batch["attention_mask"], pad_token_id=2, **plain
    )
    assert expected.shape == (3 * settings.get("num_return_sequences", 1), NEW_TOKENS)
    assert len({tuple(row) for row in expected.tolist()}) >= 3
    assert torch.equal(new_tokens(any_model, batch, **settings), expected)
    # From documents compressed before, the same.
    assert torch.equal(new_tokens(any_model, {**only(batch, *PROMPT), **memory}, **settings), expected)


SAME_AS_GREEDY = {
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "prefill in pieces": {"prefill_chunk_size": 16},
}


@pytest.fixture(scope="module", params=[*GENERATORS, *LEARNED_POSITIONS])
def any_generator(request):
    """One model per generator architecture; read-only."""
    return build_model("n_layers", generator=request.param)


def test_caches_and_prefill_do_not_change_a_token(any_generator):
    batch = batch_of(any_generator)
    expected = new_tokens(any_generator, batch, **GREEDY, **NO_END)
    for mode, settings in SAME_AS_GREEDY.items():
        assert torch.equal(new_tokens(any_generator, batch, **GREEDY, **NO_END, **settings), expected), mode


def test_a_prompt_may_be_read_one_token_at_a_time(model):
    batch = batch_of(model, QUESTIONS[0], DOCUMENTS[0])
    settings = {**GREEDY, **NO_END, "prefill_chunk_size": 1}
    assert torch.equal(new_tokens(model, batch, **settings), new_tokens(model, batch, **GREEDY, **NO_END))


@pytest.mark.parametrize(
    "mode", [name if i < 2 else pytest.param(name, marks=pytest.mark.slow) for i, name in enumerate(MODES)]
)
def test_the_documents_matter_in_every_mode(model, mode):
    """Guards the tests above: other documents give other tokens, so nothing here agrees by ignoring them."""
    batch = batch_of(model)
    other = batch_of(model, documents=[[text[::-1] for text in listed] for listed in DOCUMENTS])
    memory = memory_of(model, batch)
    zeros = {**memory, "memory_embeddings": torch.zeros_like(memory["memory_embeddings"])}
    settings = {**GREEDY, **MODES[mode]}
    tokens = new_tokens(model, batch, **settings)
    assert not torch.equal(tokens, new_tokens(model, {**only(batch, *PROMPT), **zeros}, **settings))
    assert not torch.equal(new_tokens(model, batch, **GREEDY), new_tokens(model, other, **GREEDY))


@torch.no_grad()
def test_greedy_decoding_equals_a_loop_over_the_forward_pass(any_model):
    batch = batch_of(any_model, QUESTIONS[0], DOCUMENTS[0])
    ids, mask, slots = (batch[name] for name in PROMPT)
    for _ in range(NEW_TOKENS):
        logits = any_model(input_ids=ids, attention_mask=mask, slot_mask=slots, **only(batch, *CHUNKS)).logits
        logits[..., 1] = -torch.inf
        ids = torch.cat([ids, logits[:, -1:].argmax(dim=-1)], dim=1)
        mask, slots = torch.cat([mask, mask[:, :1]], dim=1), torch.cat([slots, slots[:, :1]], dim=1)
    assert not slots[:, -NEW_TOKENS:].any()
    tokens = new_tokens(any_model, batch, **GREEDY, **NO_END)
    assert torch.equal(tokens, ids[:, -NEW_TOKENS:])


@pytest.mark.parametrize(
    ("any_model", "mode"),
    [
        ("n_layers", "greedy"),
        ("n_layers", "beams"),
        ("n_layers", "greedy, static cache"),
        ("modernbert", "greedy"),
        ("llm", "greedy"),
    ],
    indirect=["any_model"],
)
def test_a_batch_equals_its_examples_one_by_one(any_model, mode):
    questions, documents = [*QUESTIONS, "Alone?"], [*DOCUMENTS, []]
    settings = {**GREEDY, **MODES[mode]}
    together = new_tokens(any_model, batch_of(any_model, questions, documents), **settings)
    alone = [
        row
        for question, listed in zip(questions, documents, strict=True)
        for row in new_tokens(any_model, batch_of(any_model, question, listed), **settings)
    ]
    assert [without_padding(row) for row in together] == [without_padding(row) for row in alone]


def test_a_seed_repeats_a_sample_and_another_does_not(model):
    batch = batch_of(model)
    settings = {"do_sample": True, "max_new_tokens": NEW_TOKENS}
    first = new_tokens(model, batch, **settings)
    assert torch.equal(new_tokens(model, batch, **settings), first)
    assert not torch.equal(model.generate(**batch, **settings)[:, -NEW_TOKENS:], first)


def test_beams_find_what_greedy_search_does_not(model):
    batch = batch_of(model)
    settings = {"max_new_tokens": NEW_TOKENS, **NO_END, "return_dict_in_generate": True, "output_scores": True}
    beams = model.generate(**batch, num_beams=4, num_return_sequences=4, length_penalty=0.0, **settings)
    scores = beams.sequences_scores.view(3, 4)
    assert (scores.diff(dim=1) <= 0).all()
    # The score is the log-probability of the answer, computed here by reading it again.
    repeated = {name: batch[name].repeat_interleave(4, dim=0) for name in ("attention_mask", "slot_mask")}
    memory = memory_of(model, batch)
    owners = batch["document_to_example"][batch["chunk_to_document"]]
    order = torch.cat([(owners == i).nonzero().flatten().repeat(4) for i in range(3)])
    with torch.no_grad():
        logits = model(
            input_ids=beams.sequences,
            attention_mask=torch.nn.functional.pad(repeated["attention_mask"], (0, NEW_TOKENS), value=1),
            slot_mask=torch.nn.functional.pad(repeated["slot_mask"], (0, NEW_TOKENS)),
            **{name: tensor[order] for name, tensor in memory.items()},
        ).logits[:, -NEW_TOKENS - 1 : -1]
    chosen = logits.log_softmax(dim=-1).gather(2, beams.sequences[:, -NEW_TOKENS:, None]).squeeze(-1)
    torch.testing.assert_close(chosen.sum(dim=1), beams.sequences_scores, rtol=1e-3, atol=1e-3)


def test_prompt_lookup_changes_nothing_but_the_speed(model):
    batch = batch_of(model, QUESTIONS[0], DOCUMENTS[0])
    settings = {"do_sample": False, "max_new_tokens": 24, **NO_END}
    expected = new_tokens(model, batch, **settings)
    assert torch.equal(new_tokens(model, batch, **settings, prompt_lookup_num_tokens=3), expected)


def test_a_second_model_may_draft(model):
    batch = batch_of(model, QUESTIONS[0], DOCUMENTS[0])
    expected = new_tokens(model, batch, **GREEDY)
    for assistant in (model, build_model("n_layers", seed=5)):
        assert torch.equal(new_tokens(model, batch, **GREEDY, assistant_model=assistant), expected)


@torch.no_grad()
def test_a_repetition_penalty_counts_prompt_and_answer(model):
    batch = batch_of(model, QUESTIONS[0], DOCUMENTS[0])
    memory = memory_of(model, batch)
    penalty = RepetitionPenaltyLogitsProcessor(1.8)
    ids, mask, slots = (batch[name] for name in PROMPT)
    for _ in range(NEW_TOKENS):
        logits = model(input_ids=ids, attention_mask=mask, slot_mask=slots, **memory).logits[:, -1]
        logits[:, 1] = -torch.inf
        ids = torch.cat([ids, penalty(ids, logits).argmax(dim=-1, keepdim=True)], dim=1)
        mask, slots = torch.cat([mask, mask[:, :1]], dim=1), torch.cat([slots, slots[:, :1]], dim=1)
    penalized = new_tokens(model, batch, **GREEDY, **NO_END, repetition_penalty=1.8)
    assert torch.equal(penalized, ids[:, -NEW_TOKENS:])
    assert not torch.equal(penalized, new_tokens(model, batch, **GREEDY, **NO_END))


def test_generation_stops_where_it_is_told(model):
    batch = batch_of(model, QUESTIONS[0], DOCUMENTS[0])
    tokens = new_tokens(model, batch, **GREEDY, **NO_END)[0].tolist()
    third = tokens[2]
    assert third not in tokens[:2]

    class AfterThird(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return input_ids[:, -1] == third

    stopping = StoppingCriteriaList([AfterThird()])
    assert new_tokens(model, batch, **GREEDY, stopping_criteria=stopping)[0].tolist() == tokens[:3]
    assert new_tokens(model, batch, **GREEDY, eos_token_id=third)[0].tolist() == tokens[:3]
    assert new_tokens(model, batch, do_sample=False, max_new_tokens=5)[0].tolist() == tokens[:5]
    length = batch["input_ids"].shape[1]
    assert new_tokens(model, batch, do_sample=False, max_length=length + 4)[0].tolist() == tokens[:4]
    tokenizer = model.processor.tokenizer
    text = tokenizer.decode(tokens[:1])
    stopped = new_tokens(model, batch, **GREEDY, stop_strings=[text], tokenizer=tokenizer)
    assert stopped[0].tolist() == tokens[:1]


def test_an_answer_ends_at_the_generators_own_end_token(any_model):
    batch = batch_of(any_model)
    assert any_model.generation_config.eos_token_id == 1
    tokens = new_tokens(any_model, batch, **GREEDY, sequence_bias={(1,): 1e4})
    assert tokens.tolist() == [[1]] * 3
    assert any_model.answer(QUESTIONS, DOCUMENTS, **GREEDY, sequence_bias={(1,): 1e4}) == [""] * 3


def test_a_finished_answer_is_padded_while_others_go_on(model):
    batch = batch_of(model)
    tokens = new_tokens(model, batch, **GREEDY, **NO_END)
    end = int(tokens[0, 2])
    assert not (tokens[1:, :6] == end).any()
    stopped = new_tokens(model, batch, **{**GREEDY, "max_new_tokens": 6}, eos_token_id=end)
    assert stopped[0].tolist() == [*tokens[0, :3].tolist(), 2, 2, 2]
    assert torch.equal(stopped[1:], tokens[1:, :6])


@torch.no_grad()
def test_a_full_record_of_the_generation_can_be_had(model):
    batch = batch_of(model)
    output = model.generate(
        **batch,
        **GREEDY,
        **NO_END,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
    )
    assert len(output.scores) == len(output.logits) == len(output.hidden_states) == NEW_TOKENS
    torch.testing.assert_close(output.logits[0], model(**batch).logits[:, -1], rtol=1e-4, atol=1e-4)
    assert torch.equal(torch.stack(output.scores, dim=1).argmax(dim=-1), output.sequences[:, -NEW_TOKENS:])
    assert output[CACHE_NAME].get_seq_length() == output.sequences.shape[1] - 1


def test_an_answer_can_be_streamed_from_another_thread(model):
    batch = batch_of(model, QUESTIONS[0], DOCUMENTS[0])
    expected = model.answer(QUESTIONS[0], DOCUMENTS[0], **GREEDY, **NO_END)
    streamer = TextIteratorStreamer(model.processor.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    thread = threading.Thread(target=model.generate, kwargs={**batch, **GREEDY, **NO_END, "streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert len(pieces) > 2
    assert "".join(pieces).strip() == expected


@pytest.mark.parametrize("mode", MODES)
def test_documents_are_compressed_once(model, mode):
    batch = batch_of(model)
    settings = {**GREEDY, **MODES[mode]}
    assert count_compressions(model, lambda: model.generate(**batch, **settings)) == 1
    ready = {**only(batch, *PROMPT), **memory_of(model, batch)}
    assert count_compressions(model, lambda: model.generate(**ready, **settings)) == 0
    asked = {"max_new_tokens": 3, "return_reranking_scores": True}
    assert count_compressions(model, lambda: model.answer(QUESTIONS, DOCUMENTS, **asked, **MODES[mode])) == 1


def test_documents_are_compressed_once_with_a_drafting_model_too(model):
    batch = batch_of(model, QUESTIONS[0], DOCUMENTS[0])
    for settings in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": build_model("n_layers", seed=5)}):
        assert count_compressions(model, lambda kwargs=settings: model.generate(**batch, **GREEDY, **kwargs)) == 1


def test_the_prompt_may_come_as_the_first_argument(model):
    batch = batch_of(model)
    expected = model.generate(**batch, **GREEDY)
    ids = batch.pop("input_ids")
    assert torch.equal(model.generate(ids, **batch, **GREEDY), expected)
    assert torch.equal(model.generate(inputs=ids, **batch, **GREEDY), expected)


@pytest.mark.parametrize("new_ids_only", [False, True])
@torch.no_grad()
def test_a_prompt_is_continued_from_the_cache_of_what_was_read(any_generator, new_ids_only):
    """The first document is read, then the rest of the prompt, second document included."""
    batch = batch_of(any_generator, QUESTIONS[0], DOCUMENTS[0])
    expected = new_tokens(any_generator, batch, **GREEDY)
    memory = memory_of(any_generator, batch)
    embeddings = memory["memory_embeddings"][memory["memory_mask"]]
    count = int(batch["chunk_slots"][batch["chunk_to_document"] == 0].sum())
    cut = int(batch["slot_mask"][0].nonzero()[count])
    start = {name: batch[name][:, :cut] for name in PROMPT}
    cache = any_generator(**start, memory_embeddings=embeddings[:count], use_cache=True)[CACHE_NAME]
    rest = {**only(batch, *PROMPT), "memory_embeddings": embeddings}
    if new_ids_only:
        rest |= {name: batch[name][:, cut:] for name in ("input_ids", "slot_mask")}
        rest["memory_embeddings"] = embeddings[count:]
    sequences = any_generator.generate(**rest, **{CACHE_NAME: cache}, **GREEDY)
    assert torch.equal(sequences[:, rest["input_ids"].shape[1] :], expected)


# -- plain text in, plain text out ------------------------------------------------------------------------------------


def test_answer_equals_processor_and_generate(any_model):
    sequences = any_model.generate(**batch_of(any_model), **GREEDY)
    expected = any_model.processor.decode_answers(sequences, batch_of(any_model)["input_ids"].shape[1])
    assert any_model.answer(QUESTIONS, DOCUMENTS, **GREEDY) == expected
    assert len(set(expected)) == 3
    assert any_model.answer(QUESTIONS[0], DOCUMENTS[0], **GREEDY) == expected[0]
    assert any_model.answer(QUESTIONS[:1], DOCUMENTS[:1], **GREEDY) == expected[:1]
    for size in (1, 2):
        assert any_model.answer(QUESTIONS, DOCUMENTS, batch_size=size, **GREEDY) == expected


def test_all_routes_to_an_answer_agree(any_model):
    """The calls of published OSCAR and PISCO models, end to end and in two steps."""
    questions, documents = QUESTIONS[:2], [DOCUMENTS[0], [DOCUMENTS[1][0], DOCUMENTS[2][0]]]
    expected = any_model.answer(questions, documents, **GREEDY)
    assert any_model.generate_from_text(questions, documents, max_new_tokens=NEW_TOKENS) == expected
    asked = [question for question in questions for _ in range(2)]
    compressed = any_model.compress_documents([text for listed in documents for text in listed], asked)
    # One of the four documents has several chunks, the others end in zeros.
    assert compressed.shape[0] == 4
    assert compressed.shape[1] > 4
    assert compressed.shape[2] == 32
    assert (compressed[0, 4:] == 0).all()
    route = any_model.generate_from_compressed_documents_and_questions
    assert route(questions, compressed, max_new_tokens=NEW_TOKENS) == expected
    assert route(questions[:1], compressed[:2], max_new_tokens=NEW_TOKENS) == expected[:1]


def test_compress_documents_returns_the_chunks_of_each_document_in_order(any_model):
    documents = [DOCUMENTS[2][0], DOCUMENTS[1][0], DOCUMENTS[2][1]]
    compressed = any_model.compress_documents(documents, QUESTIONS)
    for row, question, document in zip(compressed, QUESTIONS, documents, strict=True):
        chunks = any_model.compress(question, [document])
        expected = chunks.memory_embeddings[chunks.memory_mask]
        torch.testing.assert_close(row[: len(expected)], expected, rtol=1e-4, atol=1e-4)
        assert (row[len(expected) :] == 0).all()


def test_documents_can_be_compressed_for_no_question_in_particular(any_model):
    text = DOCUMENTS[2][0]
    batch = any_model.processor.encode_documents([""], [[text]])
    with torch.no_grad():
        expected = any_model.get_memory_embeddings(**only(batch, *CHUNKS)).memory_embeddings
    torch.testing.assert_close(any_model.compress_documents([text]), expected)
    assert (any_model.compress_documents([text]) - any_model.compress_documents([text], ["Who?"])).abs().max() > 1e-2


def test_rank_has_the_form_of_a_cross_encoders(any_model):
    """`sentence_transformers.CrossEncoder.rank`: dictionaries of corpus_id and score, and text on request."""
    documents = [*DOCUMENTS[2], *DOCUMENTS[0], DOCUMENTS[1][0]]
    ranking = any_model.rank(QUESTIONS[2], documents)
    assert [list(result) for result in ranking] == [["corpus_id", "score"]] * 6
    assert sorted(result["corpus_id"] for result in ranking) == list(range(6))
    assert {type(result["corpus_id"]) for result in ranking} == {int}
    scores = [result["score"] for result in ranking]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == 6
    assert json.loads(json.dumps(ranking)) == ranking
    assert any_model.rank(QUESTIONS[2], documents, top_k=2) == ranking[:2]
    texts = any_model.rank(QUESTIONS[2], documents, top_k=3, return_documents=True)
    assert texts == [{**result, "text": documents[result["corpus_id"]]} for result in ranking[:3]]
    messages = [{"role": "assistant", "content": "Ask."}, {"role": "user", "content": QUESTIONS[2]}]
    assert any_model.rank(messages, documents) == ranking
    sizes = any_model.rank(QUESTIONS[2], documents, batch_size=2)
    assert [result["corpus_id"] for result in sizes] == [result["corpus_id"] for result in ranking]


def test_one_pass_gives_the_answer_and_the_scores_of_rank(any_model):
    expected = any_model.answer(QUESTIONS, DOCUMENTS, **GREEDY)
    answers, scores = any_model.answer(QUESTIONS, DOCUMENTS, return_reranking_scores=True, batch_size=2, **GREEDY)
    assert answers == expected
    assert [len(row) for row in scores] == [2, 1, 3]
    for question, documents, row in zip(QUESTIONS, DOCUMENTS, scores, strict=True):
        ranked = {result["corpus_id"]: result["score"] for result in any_model.rank(question, documents)}
        assert row == pytest.approx([ranked[i] for i in range(len(documents))], rel=1e-3, abs=1e-4)
    answer, row = any_model.answer(QUESTIONS[0], DOCUMENTS[0], return_reranking_scores=True, **GREEDY)
    assert answer == expected[0]
    assert row == pytest.approx(scores[0], rel=1e-3, abs=1e-4)


def test_a_long_document_ranks_by_its_best_chunk(any_model):
    chunks = any_model.compress(QUESTIONS[1], DOCUMENTS[1])
    assert len(chunks.reranking_scores) > 2
    assert chunks.chunk_to_document.tolist() == [0] * len(chunks.reranking_scores)
    result = any_model.rank(QUESTIONS[1], DOCUMENTS[1])[0]
    assert result["score"] == pytest.approx(float(chunks.reranking_scores.max()))
    assert result["score"] == document_scores(chunks.reranking_scores, chunks.chunk_to_document, 1).item()


def test_settings_of_a_call_reach_every_route(any_model):
    wide = any_model.compress(QUESTIONS, DOCUMENTS)
    narrow = any_model.compress(QUESTIONS, DOCUMENTS, compression_rate=32)
    single = any_model.compress(QUESTIONS, DOCUMENTS, num_memory_tokens=1)
    assert wide.memory_mask.sum() > narrow.memory_mask.sum() == len(narrow.memory_mask)
    assert single.memory_embeddings.shape[1] == 1
    assert any_model.answer(QUESTIONS, DOCUMENTS, **GREEDY) != any_model.answer(
        QUESTIONS, DOCUMENTS, num_memory_tokens=1, **GREEDY
    )
    batch = batch_of(any_model, num_memory_tokens=1)
    sequences = any_model.generate(**batch, **GREEDY)
    expected = any_model.processor.decode_answers(sequences, batch["input_ids"].shape[1])
    assert any_model.answer(QUESTIONS, DOCUMENTS, num_memory_tokens=1, **GREEDY) == expected


def test_without_documents_the_generator_answers_alone(any_model):
    batch = batch_of(any_model, documents=None)
    sequences = any_model.generator.generate(**only(batch, "input_ids", "attention_mask"), pad_token_id=2, **GREEDY)
    expected = any_model.processor.decode_answers(sequences, batch["input_ids"].shape[1])
    assert any_model.answer(QUESTIONS, **GREEDY) == expected
    assert any_model.answer(QUESTIONS, [[], [], []], **GREEDY) == expected
    assert any_model.answer(QUESTIONS[0], [], **GREEDY) == expected[0]
    assert count_compressions(any_model, lambda: any_model.answer(QUESTIONS, **GREEDY)) == 0
    mixed, scores = any_model.answer(
        QUESTIONS, [DOCUMENTS[0], [], DOCUMENTS[2]], return_reranking_scores=True, batch_size=1, **GREEDY
    )
    assert mixed[1] == expected[1]
    assert [len(row) for row in scores] == [2, 0, 3]
    assert any_model.rank(QUESTIONS[0], []) == []
    with pytest.raises(ValueError, match="documents is empty; there is nothing to compress"):
        any_model.compress(QUESTIONS[0], [])


def test_several_answers_per_question_come_as_a_list(model):
    settings = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False, "max_new_tokens": 6}
    answers = model.answer(QUESTIONS[0], DOCUMENTS[0], **settings)
    assert len(answers) == 2
    assert answers[0] == model.answer(QUESTIONS[0], DOCUMENTS[0], **{**settings, "num_return_sequences": 1})
    assert len(model.answer(QUESTIONS, DOCUMENTS, **settings)) == 6
    record = model.answer(QUESTIONS, DOCUMENTS, return_dict_in_generate=True, output_scores=True, **GREEDY)
    assert record == model.answer(QUESTIONS, DOCUMENTS, **GREEDY)


def test_an_answer_that_does_not_fit_the_context_is_refused(model):
    length = int(batch_of(model, QUESTIONS[0], DOCUMENTS[0])["attention_mask"].sum())
    fitting = model.answer(QUESTIONS[0], DOCUMENTS[0], max_new_tokens=512 - length, eos_token_id=list(range(3, 400)))
    assert isinstance(fitting, str)
    message = rf"has a prompt of {length} tokens; with max_new_tokens={513 - length} that exceeds .* 512 positions"
    with pytest.raises(ValueError, match=r"questions\[0\] " + message):
        model.answer(QUESTIONS[0], DOCUMENTS[0], max_new_tokens=513 - length)
    config = GenerationConfig(max_new_tokens=513 - length, pad_token_id=2)
    with pytest.raises(ValueError, match=message):
        model.answer(QUESTIONS[0], DOCUMENTS[0], generation_config=config)
    # The question is named by its place in the call, not in its batch.
    longest = ["Short?", "Short?", QUESTIONS[1] * 4]
    with pytest.raises(ValueError, match=r"questions\[2\] has a prompt of"):
        model.answer(longest, [["a"]] * 3, max_new_tokens=410, batch_size=1, eos_token_id=list(range(3, 400)))
    compressed = model.compress_documents(DOCUMENTS[0], [QUESTIONS[0]] * 2)
    with pytest.raises(ValueError, match=message):
        model.generate_from_compressed_documents_and_questions(QUESTIONS[:1], compressed, 513 - length)


def test_a_length_of_ones_own_replaces_the_default(model, monkeypatch):
    seen = []
    original = type(model).generate
    monkeypatch.setattr(type(model), "generate", lambda self, **kw: seen.append(kw) or original(self, **kw))
    stop = {"eos_token_id": list(range(3, 400))}
    model.answer(QUESTIONS[0], DOCUMENTS[0], **stop)
    model.answer(QUESTIONS[0], DOCUMENTS[0], max_length=90, **stop)
    model.answer(QUESTIONS[0], DOCUMENTS[0], generation_config=GenerationConfig(max_new_tokens=2, pad_token_id=2))
    assert [kwargs.get("max_new_tokens") for kwargs in seen] == [128, None, None]


REFUSED = [
    (lambda m: m.answer(QUESTIONS, DOCUMENTS, batch_size=0), ValueError, "batch_size=0 must be a whole number"),
    (lambda m: m.answer(QUESTIONS, DOCUMENTS, batch_size="4"), ValueError, "batch_size=.4. must be a whole number"),
    (lambda m: m.answer(QUESTIONS, DOCUMENTS, batch_size=-1), ValueError, "batch_size=-1 must be a whole number"),
    (lambda m: m.compress(QUESTIONS, DOCUMENTS, batch_size=-1), ValueError, "batch_size=-1 must be a whole number"),
    (lambda m: m.answer("Who?", "One text."), TypeError, "documents is one string"),
    (lambda m: m.answer(["Who?"], [["a", ""]]), ValueError, r"documents\[0\]\[1\] is empty"),
    (
        lambda m: m.rank(["Who?"], ["a"]),
        TypeError,
        "question must be one string, got list; call rank once per question",
    ),
    (lambda m: m.rank("Who?", "a"), TypeError, "documents is one string"),
    (lambda m: m.rank("Who?", ["a", " "]), ValueError, r"documents\[0\]\[1\] is empty"),
    (lambda m: m.compress_documents("a"), TypeError, "must be lists of strings, one question per document"),
    (lambda m: m.compress_documents(["a"], "Who?"), TypeError, "must be lists of strings"),
    (lambda m: m.compress_documents(["a", "b"], ["Who?"]), ValueError, "2 documents but 1 questions"),
    (lambda m: m.compress_documents([]), ValueError, "documents is empty"),
    (lambda m: m.compress_documents(["a", ""]), ValueError, r"documents\[1\]\[0\] is empty"),
    (lambda m: m.compress_documents(["a"], [""]), ValueError, r"questions\[0\] is empty"),
]
MISMATCHED = [
    ("Who?", (2, 4, 32), TypeError, "questions must be a list of strings"),
    (["Who?"], (4, 32), ValueError, r"has shape \(4, 32\), expected \(n_docs, slots, 32\)"),
    (["Who?"], (2, 4, 31), ValueError, r"has shape \(2, 4, 31\), expected \(n_docs, slots, 32\)"),
    (["Who?", "What?"], (3, 4, 32), ValueError, "3 compressed documents cannot be shared out equally over 2 questions"),
    ([], (3, 4, 32), ValueError, "cannot be shared out equally over 0 questions"),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_wrong_arguments_are_refused(model, call, error, message):
    with pytest.raises(error, match=message):
        call(model)


@pytest.mark.parametrize(("questions", "shape", "error", "message"), MISMATCHED)
def test_compressed_documents_of_another_shape_are_refused(model, questions, shape, error, message):
    with pytest.raises(error, match=message):
        model.generate_from_compressed_documents_and_questions(questions, torch.ones(shape))


@pytest.mark.parametrize(
    "call",
    [lambda m: m.rank("Who?", ["a"]), lambda m: m.answer("Who?", ["a"], return_reranking_scores=True)],
    ids=["rank", "answer"],
)
def test_scores_of_a_model_without_reranking_are_refused(call):
    with pytest.raises(ValueError, match="built with enable_reranking=False and has no reranking scores"):
        call(build_model("n_layers", enable_reranking=False))


@torch.no_grad()
def test_documents_fill_slots_of_embeddings_that_are_given(any_generator):
    batch = batch_of(any_generator)
    expected = new_tokens(any_generator, batch, **GREEDY)
    ids = batch.pop("input_ids")
    embeds = any_generator.get_input_embeddings()(ids)
    tokens = any_generator.generate(**batch, inputs_embeds=embeds, **GREEDY)
    assert torch.equal(tokens, expected)
    logits = any_generator(**batch, inputs_embeds=embeds).logits
    torch.testing.assert_close(logits, any_generator(input_ids=ids, **batch).logits)
    with pytest.raises(ValueError, match="The prompt has 0 slots but the documents"):
        any_generator.generate(**{**batch, "slot_mask": None}, inputs_embeds=embeds, **GREEDY)


def test_an_assistant_may_be_a_plain_language_model(model):
    batch = batch_of(model, QUESTIONS[0], DOCUMENTS[0])
    expected = new_tokens(model, batch, **GREEDY)
    for assistant in (model.generator, build_model("n_layers", seed=5).generator):
        assert torch.equal(new_tokens(model, batch, **GREEDY, assistant_model=assistant), expected)


def test_an_assistant_may_be_a_narrower_model_of_this_kind(model):
    config = build_config("n_layers").to_dict()
    config["generator_config"]["hidden_size"] = 16
    config.pop("compressor_config")
    assistant = ScaleDownModel(ScaleDownConfig(**config)).eval()
    assistant.generation_config.pad_token_id = model.generation_config.pad_token_id
    batch = batch_of(model, QUESTIONS[0], DOCUMENTS[0])
    expected = new_tokens(model, batch, **GREEDY)
    assert torch.equal(new_tokens(model, batch, **GREEDY, assistant_model=assistant), expected)


def test_without_a_mask_slots_are_no_padding():
    model = build_model("n_layers")
    model.processor.tokenizer.bos_token = None  # so that padding's id stands at the slots, as in Qwen's prompts
    for questions, documents in ((QUESTIONS[:1], DOCUMENTS[:1]), (QUESTIONS, DOCUMENTS)):
        batch = batch_of(model, questions, documents)
        assert (batch["input_ids"][batch["slot_mask"]] == model.generation_config.pad_token_id).all()
        expected = new_tokens(model, batch, **GREEDY)
        del batch["attention_mask"]
        assert torch.equal(new_tokens(model, batch, **GREEDY), expected)


def test_what_cannot_assist_is_refused():
    model = build_model("n_layers")
    batch = batch_of(model, QUESTIONS[0], DOCUMENTS[0])
    with pytest.raises(ValueError, match="assistant_model='org/name' must be a loaded model"):
        model.generate(**batch, **GREEDY, assistant_model="org/name")
    with pytest.raises(ValueError, match="assistant_early_exit is not possible here"):
        model.generate(**batch, **GREEDY, assistant_early_exit=2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_process_forked_while_another_thread_tokenizes_goes_on(model):
    processor = model.processor
    stop = threading.Event()

    def tokenize():
        while not stop.is_set():
            processor(QUESTIONS[0], DOCUMENTS[0])

    thread = threading.Thread(target=tokenize)
    thread.start()
    try:
        for _ in range(10):
            child = os.fork()
            if child == 0:
                signal.alarm(20)  # ends it where it hangs
                processor(QUESTIONS[1], DOCUMENTS[1])
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        thread.join()
