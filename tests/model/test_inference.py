"""What makes inference faster changes no answer: passes of like length, the cache, documents left out."""

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from transformers import GenerationConfig

import compressor_scaledown
from compression_scaledown import CompressionCache, pass_sizes
from reranking_scaledown import select_documents
from scaledown import ScaleDownModel
from shortcuts_scaledown import CACHE_NAME
from tiny import DOCUMENTS, QUESTIONS, build_model, randomize_lora

KEYS = ("memory_embeddings", "memory_mask", "reranking_scores")
WRITING = {"max_new_tokens": 6, "do_sample": False}


def assert_same(actual, expected):
    for name in KEYS:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-5)


# -- passes of like length --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lengths", "batch_size", "large", "sizes"),
    [
        ([], 4, 100, []),
        ([9, 9, 9, 9, 9], 2, 1000, [2, 2, 1]),
        ([100, 99, 50, 49, 10], 64, 200, [2, 3]),  # two of fifty are no large pass yet
        ([100, 99, 50, 49, 10], 64, 100, [2, 2, 1]),
        ([100, 90, 80], 64, 100, [2, 1]),
        ([100, 99, 50], 64, 1000, [3]),
    ],
)
def test_a_pass_ends_when_it_is_full_or_padding_would_begin(lengths, batch_size, large, sizes):
    assert pass_sizes(lengths, batch_size, large) == sizes


def test_chunks_are_compressed_by_length_and_come_back_in_order(any_model, monkeypatch):
    texts = [["word " * n for n in (3, 20, 1, 12, 30, 2, 19)], ["Herons are birds.", "A crane lifts things. " * 9]]
    expected = any_model.get_memory_embeddings(
        **{
            name: value
            for name, value in any_model.processor.encode_documents(QUESTIONS[:2], texts).items()
            if name not in ("chunk_to_document", "document_to_example")
        }
    )
    monkeypatch.setattr("compression_scaledown.LARGE_PASS", {"cpu": 1})
    seen = []

    def watch(module, inputs):
        lengths = inputs[1].sum(dim=1)
        seen.append((int(lengths.max()), int(lengths.min())))

    any_model.compressor.register_forward_pre_hook(watch)
    compressed = any_model.compress(QUESTIONS[:2], texts)
    assert_same(compressed, expected)
    assert len(seen) > 2
    assert seen == sorted(seen, reverse=True)
    assert all(shortest >= 0.85 * longest for longest, shortest in seen)
    passes = len(seen)
    answers = any_model.answer(QUESTIONS[:2], texts, **WRITING)
    sequences = any_model.generate(**(batch := any_model.processor(QUESTIONS[:2], texts)), **WRITING)
    assert any_model.processor.decode_answers(sequences, batch["input_ids"].shape[1]) == answers
    assert len(seen) == 3 * passes


# -- cache ------------------------------------------------------------------------------------------------------------


def test_repeated_chunks_are_not_compressed_again(monkeypatch):
    model = build_model("n_layers")
    expected = model.compress(QUESTIONS, DOCUMENTS)
    answers = model.answer(QUESTIONS, DOCUMENTS, **WRITING)
    assert model.optimize_for_inference(cache_entries=100) is model
    assert_same(model.compress(QUESTIONS, DOCUMENTS), expected)
    chunks = len(expected.memory_mask)
    assert (model.compression_cache.hits, model.compression_cache.misses) == (0, chunks)
    monkeypatch.setattr(model.compressor, "forward", None)  # is not called any more
    assert_same(model.compress(QUESTIONS, DOCUMENTS), expected)
    assert model.answer(QUESTIONS, DOCUMENTS, **WRITING) == answers
    assert model.compression_cache.hit_rate == pytest.approx(2 / 3)
    assert [row["corpus_id"] for row in model.rank(QUESTIONS[2], DOCUMENTS[2])]


def test_question_slots_and_text_are_part_of_what_is_remembered():
    model = build_model("n_layers").optimize_for_inference(cache_entries=100)
    ivanhoe, other = DOCUMENTS[0]  # of more than one slot each
    for question, document, settings in (
        ("Who wrote it?", ivanhoe, {}),
        ("Who read it?", ivanhoe, {}),
        ("Who wrote it?", other, {}),
        ("Who wrote it?", ivanhoe, {"num_memory_tokens": 1}),
    ):
        model.compress(question, [document], **settings)
    assert model.compression_cache.hits == 0
    documents = [ivanhoe, "He was born in Edinburgh.", ivanhoe]
    mixed = model.compress("Who wrote it?", documents)
    assert model.compression_cache.hits == 2
    model.compression_cache = None
    assert_same(mixed, model.compress("Who wrote it?", documents))


def test_a_full_cache_forgets_what_was_not_used_for_longest():
    cache = CompressionCache(2)
    for name in "ab":
        cache.put((name,), torch.zeros(1), None)
    assert cache.get(("a",)) is not None
    cache.put(("c",), torch.zeros(1), None)
    assert len(cache) == 2
    assert cache.get(("b",)) is None
    assert cache.hit_rate == 0.5
    cache.clear()
    assert len(cache) == cache.hits == cache.misses == 0
    with pytest.raises(ValueError, match="max_entries=0 must be at least 1"):
        CompressionCache(0)


def test_training_empties_the_cache():
    model = build_model("n_layers").optimize_for_inference(cache_entries=10)
    model.compress(QUESTIONS, DOCUMENTS)
    assert len(model.compression_cache) > 0
    model.eval()
    assert len(model.compression_cache) > 0
    model.train()
    assert len(model.compression_cache) == 0


def test_other_weights_empty_the_cache():
    model = build_model("n_layers").optimize_for_inference(cache_entries=10)
    model.compress(QUESTIONS, DOCUMENTS)
    other = build_model("n_layers", seed=1)
    model.load_state_dict(other.state_dict())
    assert_same(model.compress(QUESTIONS, DOCUMENTS), other.compress(QUESTIONS, DOCUMENTS))


def test_without_reranking_the_cache_holds_memory_alone():
    model = build_model("n_layers", enable_reranking=False).optimize_for_inference(cache_entries=10)
    first = model.compress(QUESTIONS, DOCUMENTS)
    again = model.compress(QUESTIONS, DOCUMENTS)
    assert again.reranking_scores is None
    torch.testing.assert_close(again.memory_embeddings, first.memory_embeddings)


def test_optimizing_merges_lora_and_changes_no_answer():
    model = randomize_lora(build_model("n_layers", lora=True))
    answers = model.answer(QUESTIONS, DOCUMENTS, **WRITING)
    model.train().optimize_for_inference()
    assert model.config.lora_config is None and not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.answer(QUESTIONS, DOCUMENTS, **WRITING) == answers


def test_decoding_that_compiles_has_a_static_cache_and_the_same_answers(monkeypatch):
    model = build_model("n_layers")
    answers = model.answer(QUESTIONS, DOCUMENTS, **WRITING)
    monkeypatch.setattr("generation_scaledown.COMPILING_DEVICES", ("cpu",))
    model.optimize_for_inference(compile=True)
    assert model.answer(QUESTIONS, DOCUMENTS, **WRITING) == answers
    batch = model.processor(QUESTIONS, DOCUMENTS)
    output = model.generate(**batch, **WRITING, return_dict_in_generate=True)
    assert type(output[CACHE_NAME]).__name__ == "StaticCache"
    assert model.processor.decode_answers(output.sequences, batch["input_ids"].shape[1]) == answers
    assert model.generate(**batch, **WRITING, use_cache=False).tolist() == output.sequences.tolist()
    assert model.generation_config.cache_implementation is None  # nothing of it is saved
    # What does not go with a static cache, or asks for another one, is left as it is.
    alone = model.processor(QUESTIONS[:1], DOCUMENTS[:1])
    assisted = model.generate(**alone, **WRITING, prompt_lookup_num_tokens=2)
    assert assisted.tolist() == model.generate(**alone, **WRITING).tolist()
    for implementation, expected in ((None, "StaticCache"), ("dynamic", "DynamicCache")):
        settings = GenerationConfig(**WRITING, cache_implementation=implementation, return_dict_in_generate=True)
        output = model.generate(**batch, generation_config=settings)
        assert type(output[CACHE_NAME]).__name__ == expected
        assert settings.cache_implementation == implementation
    model.optimize_for_inference()
    output = model.generate(**batch, **WRITING, return_dict_in_generate=True)
    assert type(output[CACHE_NAME]).__name__ == "DynamicCache"


@pytest.mark.parametrize("kind", ["n_layers", pytest.param("modernbert", marks=pytest.mark.slow)])
def test_layers_of_the_compressor_compile_once_for_all_of_them(kind, monkeypatch):
    settings = {"num_layers": 4, "num_compressor_layers": 4} if kind == "n_layers" else {}
    model = build_model(kind, **settings)
    monkeypatch.setitem(compressor_scaledown.MIN_SPARED_OPERATIONS, "cpu", 1e30)
    expected = model.compress(QUESTIONS, DOCUMENTS)
    alone = model.compress(QUESTIONS[0], DOCUMENTS[0][:1])
    whole = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda layer, **kwargs: whole(layer, backend="eager", **kwargs))
    monkeypatch.setattr("generation_scaledown.COMPILING_DEVICES", ("cpu",))
    torch.compiler.reset()
    counters.clear()
    model.optimize_for_inference(compile=True)
    assert_same(model.compress(QUESTIONS, DOCUMENTS), expected)
    assert_same(model.compress(QUESTIONS[0], DOCUMENTS[0][:1]), alone)
    model.compress(QUESTIONS * 2, DOCUMENTS * 2)
    compiled = counters["stats"]["unique_graphs"]
    assert 1 <= compiled <= 5  # by shape and mask, not by layer
    # Questions read once go through a cache, for which nothing is compiled.
    monkeypatch.setitem(compressor_scaledown.MIN_SPARED_OPERATIONS, "cpu", 0)
    assert_same(model.compress(QUESTIONS, DOCUMENTS), expected)
    assert counters["stats"]["unique_graphs"] == compiled
    model.optimize_for_inference()
    torch.compiler.reset()
    assert_same(model.compress(QUESTIONS, DOCUMENTS), expected)
    assert counters["stats"]["unique_graphs"] == compiled


def test_where_decoding_cannot_be_compiled_nothing_changes(monkeypatch, caplog):
    model = build_model("n_layers")
    assert not model.optimize_for_inference(compile=True).compiles_decoding
    assert "works on cuda and xpu, and the model is on cpu" in caplog.text
    monkeypatch.setattr("generation_scaledown.COMPILING_DEVICES", ("cpu",))
    model.hf_device_map = {"compressor": "cpu", "generator": "disk"}
    assert not model.optimize_for_inference(compile=True).compiles_decoding
    assert "parts of the model are offloaded" in caplog.text
    monkeypatch.setattr(type(model.generator), "_can_compile_fullgraph", False)
    assert not model.optimize_for_inference(compile=True).compiles_decoding
    assert "LlamaForCausalLM does not go with a static cache" in caplog.text


# -- documents left out -----------------------------------------------------------------------------------------------


def test_the_best_documents_are_kept_in_their_order(any_model):
    model, question, documents = any_model, QUESTIONS[2], [*DOCUMENTS[2], *DOCUMENTS[0]]
    full, scores = model.answer(question, documents, return_reranking_scores=True, **WRITING)
    best = sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[:2])
    expected = model.answer(question, [documents[i] for i in best], **WRITING)
    assert model.answer(question, documents, max_documents=2, **WRITING) == expected
    lowest = min(scores[i] for i in best)
    answer, told = model.answer(
        question, documents, min_reranking_score=lowest - 1e-6, return_reranking_scores=True, **WRITING
    )
    assert answer == expected
    assert told == pytest.approx(scores, abs=1e-5)  # of all documents, those left out too
    assert model.answer(question, documents, max_documents=9, **WRITING) == full


@pytest.mark.parametrize(
    ("limits", "kept"),
    [
        ({}, [True, True, True, True]),
        ({"max_documents": 2}, [False, True, False, True]),
        ({"max_slots": 9}, [False, True, False, True]),
        ({"max_slots": 8}, [True, False, True, True]),  # the second best does not fit, what is behind it does
        ({"max_slots": 2}, [False, False, True, False]),
        ({"max_slots": 8, "max_documents": 2, "min_reranking_score": 0.6}, [False, False, False, True]),
        ({"max_slots": 9, "max_documents": 1}, [False, False, False, True]),
        ({"max_slots": 12, "min_reranking_score": 0.0}, [True, True, False, True]),
        ({"max_slots": 11, "min_reranking_score": 0.0}, [False, True, False, True]),
    ],
)
def test_documents_stay_by_score_as_long_as_they_fit(limits, kept):
    assert select_documents([0.5, 2.0, -1.0, 3.0], [3, 6, 1, 3], **limits) == kept


def test_a_score_that_is_no_number_is_not_enough():
    assert select_documents([float("nan"), 1.0], [1, 1], min_reranking_score=0.0) == [False, True]


def test_a_limit_on_slots_is_that_of_what_the_generator_reads():
    model = build_model("n_layers")
    question, documents = QUESTIONS[0], DOCUMENTS[0]
    best = model.rank(question, documents, top_k=1)[0]["corpus_id"]
    slots = int(model.compress(question, [documents[best]]).memory_mask.sum())
    expected = model.answer(question, documents, max_documents=1, **WRITING)
    assert model.answer(question, documents, max_slots=slots, **WRITING) == expected
    assert model.answer(question, [documents[best]], max_slots=slots - 1, **WRITING) == model.answer(
        question, [], **WRITING
    )
    for limit in (0, 1.5):
        with pytest.raises(ValueError, match=f"max_slots={limit} must be a whole number of at least 1"):
            model.answer(question, documents, max_slots=limit)


def test_a_question_without_a_document_left_is_asked_without():
    model = build_model("n_layers")
    closed = model.answer(QUESTIONS, [[], [], []], **WRITING)
    assert model.answer(QUESTIONS, DOCUMENTS, min_reranking_score=1e9, **WRITING) == closed
    assert model.answer(QUESTIONS, [[], [], []], max_documents=1, **WRITING) == closed


def test_documents_of_several_questions_are_chosen_for_each():
    model = build_model("n_layers")
    together = model.answer(QUESTIONS, DOCUMENTS, max_documents=1, **WRITING)
    assert together == [
        model.answer(question, listed, max_documents=1, **WRITING)
        for question, listed in zip(QUESTIONS, DOCUMENTS, strict=True)
    ]


def test_a_prompt_that_fits_after_the_choice_is_no_error():
    model = build_model("n_layers")
    documents = ["Herons are long-legged birds that wade. " * 3] * 60
    with pytest.raises(ValueError, match="the generator reads 512"):
        model.answer(QUESTIONS[2], documents, **WRITING)
    assert isinstance(model.answer(QUESTIONS[2], documents, max_documents=3, **WRITING), str)


def test_a_configuration_says_how_many_documents_are_read(tmp_path):
    question, documents = QUESTIONS[2], [*DOCUMENTS[2], *DOCUMENTS[0]]
    whole = build_model("n_layers")
    whole.save_pretrained(tmp_path / "whole")
    ScaleDownModel.from_pretrained(tmp_path / "whole", max_documents=2).save_pretrained(tmp_path / "two")
    model = ScaleDownModel.from_pretrained(tmp_path / "two")
    found = model.answer(question, documents, return_reranking_scores=True, **WRITING)
    expected = whole.answer(question, documents, return_reranking_scores=True, max_documents=2, **WRITING)
    assert found.documents_read == expected.documents_read and len(found.documents_read) == 2
    assert found.answers == expected.answers
    embeddings, _ = model.prompt_embeddings(question, documents)
    assert embeddings.shape == whole.prompt_embeddings(question, documents, max_documents=2)[0].shape
    for number in (1, len(documents)):  # a call's own number counts
        output = model.answer(question, documents, max_documents=number, return_reranking_scores=True, **WRITING)
        assert len(output.documents_read) == number


def test_choosing_documents_needs_reranking_and_a_number():
    with pytest.raises(ValueError, match="enable_reranking=False"):
        build_model("n_layers", enable_reranking=False).answer("Who?", ["A heron."], max_documents=1)
    with pytest.raises(ValueError, match="max_documents=0 must be a whole number"):
        build_model("n_layers").answer("Who?", ["A heron."], max_documents=0)
    assert isinstance(build_model("n_layers").answer("Who?", ["A heron."], max_documents=np.int64(1), **WRITING), str)


# -- the length of answers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "new_tokens"),
    [
        ({}, 128),
        ({"generation_config": GenerationConfig(do_sample=False, pad_token_id=2)}, 128),
        ({"generation_config": GenerationConfig(max_new_tokens=5, pad_token_id=2)}, 5),
        ({"generation_config": GenerationConfig(pad_token_id=2), "max_new_tokens": 6}, 6),
    ],
)
def test_answers_have_128_tokens_at_most_unless_a_length_is_given(arguments, new_tokens, monkeypatch):
    model = build_model("n_layers")
    model.generation_config.eos_token_id = None
    generate, lengths = model.generate, []

    def counted(**kwargs):
        sequences = generate(**kwargs)
        lengths.append(sequences.shape[1] - kwargs["input_ids"].shape[1])
        return sequences

    monkeypatch.setattr(model, "generate", counted)
    given = dict(arguments)
    model.answer(QUESTIONS[0], DOCUMENTS[0], **arguments)
    assert lengths == [new_tokens]
    assert arguments == given and getattr(arguments.get("generation_config"), "max_new_tokens", None) in (None, 5)


def part(state: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(name): value for key, value in state.items() if key.startswith(name)}


CHANGES = {
    "compressor": lambda compressor, state: compressor.load_state_dict(state),
    "backbone": lambda compressor, state: compressor.backbone.load_state_dict(part(state, "backbone.")),
    "head": lambda compressor, state: compressor.reranking_head.load_state_dict(part(state, "reranking_head.")),
    "in place": lambda compressor, state: torch.no_grad()(compressor.memory_embeddings.copy_)(
        state["memory_embeddings"]
    ),
    "type": lambda compressor, state: compressor.to(torch.bfloat16),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_cache_knows_no_weights_but_those_of_now(change):
    model = build_model("n_layers").optimize_for_inference(cache_entries=100)
    before = model.rank(QUESTIONS[0], DOCUMENTS[0])
    CHANGES[change](model.compressor, build_model("n_layers", seed=7).compressor.state_dict())
    after = model.rank(QUESTIONS[0], DOCUMENTS[0])
    assert model.compression_cache.hits == 0
    assert after != before
    model.compression_cache = None
    assert model.rank(QUESTIONS[0], DOCUMENTS[0]) == after


def test_what_cannot_be_a_limit_is_refused(model):
    for top_k in (0, -1, 1.5, "2", True):
        with pytest.raises(ValueError, match=r"top_k=.* must be a whole number of at least 1"):
            model.rank(QUESTIONS[0], DOCUMENTS[0], top_k=top_k)
    assert len(model.rank(QUESTIONS[0], DOCUMENTS[0], top_k=np.int64(1))) == 1
    for score in (float("nan"), "0.5", np.float32("nan"), True):
        with pytest.raises(ValueError, match=r"min_reranking_score=.* must be a number"):
            model.answer(QUESTIONS[0], DOCUMENTS[0], min_reranking_score=score)
    for name in ("max_documents", "max_slots"):
        with pytest.raises(ValueError, match=f"{name}=-1 must be a whole number"):
            model.answer(QUESTIONS[0], DOCUMENTS[0], **{name: -1})


def test_the_models_own_length_of_answers_counts(monkeypatch):
    model = build_model("n_layers")
    model.generation_config.eos_token_id = None
    written = []
    decode = model.processor.decode_answers
    monkeypatch.setattr(
        model.processor, "decode_answers", lambda ids, start: written.append(ids.shape[1] - start) or decode(ids, start)
    )
    settings = GenerationConfig(max_new_tokens=5, eos_token_id=None, pad_token_id=2)
    model.answer(QUESTIONS[0], DOCUMENTS[0])
    model.generation_config.max_new_tokens = 7
    model.answer(QUESTIONS[0], DOCUMENTS[0])
    model.generate_from_text(QUESTIONS[:1], DOCUMENTS[:1])
    model.answer(QUESTIONS[0], DOCUMENTS[0], max_new_tokens=3)
    model.answer(QUESTIONS[0], DOCUMENTS[0], generation_config=settings)
    assert written == [128, 7, 7, 3, 5]
    length = model.processor(QUESTIONS[0], DOCUMENTS[0])["input_ids"].shape[1]
    model.generation_config.max_new_tokens, model.generation_config.max_length = None, length + 9
    model.answer(QUESTIONS[0], DOCUMENTS[0])
    assert written[5:] == [9]
