"""The made-up world: passages tell what is asked, splits share no name, lessons learn what can be answered."""

import json
import random
import subprocess
import sys
import textwrap
import zlib

import pytest
import torch

from folders import ROOT
from scaledown.world.curriculum import Curriculum, Rows, collate
from scaledown.world.encoder import EncoderCurriculum, build_encoder, encoder_tokenizer, read_masked
from scaledown.world.generator import build_generator, read_causally
from scaledown.world.names import SPLITS, split_of
from scaledown.world.teaching import BackboneArguments, teach
from scaledown.world.text import NAME_PARTS, RELATIONS
from scaledown.world.tokenizer import build_tokenizer
from scaledown.world.world import RIGHT, World


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def records(split, count=40, num_documents=5, two_hops=0.5, seed=0):
    world = World(split, seed)
    return [world.record(number, num_documents, two_hops) for number in range(count)]


def test_is_as_large_as_promised():
    assert len(RELATIONS) == 6
    assert sum(len(relations) for relations in RELATIONS.values()) >= 25
    assert all(len(r.statements) >= 3 and len(r.questions) >= 2 for listed in RELATIONS.values() for r in listed)


def test_equal_seeds_give_equal_records_and_others_do_not():
    assert records("train", 5) == records("train", 5)
    assert records("train", 5) != records("train", 5, seed=1)


@pytest.mark.parametrize("num_documents", [2, 5, 20])
def test_right_passages_and_no_other_hold_the_answer(num_documents):
    for record in records("test", 30, num_documents):
        assert len(record["documents"]) == len(set(record["documents"])) == num_documents
        assert len(record["positives"]) == record["hops"]
        assert any(record["answer"] in record["documents"][index] for index in record["positives"])
        assert [score == RIGHT for score in record["reranking_scores"]] == [
            index in record["positives"] for index in range(num_documents)
        ]
        assert max(record["positives"]) < 5
        asked = [question.split("{n}") for relation in RELATIONS[record["kind"]] for question in relation.questions]
        assert any(record["query"].startswith(begins) and record["query"].endswith(ends) for begins, ends in asked)


def test_two_hops_name_only_the_first_thing():
    world = World("train")
    for _ in range(30):
        passages, first, second = world.context(5, 2)
        for question in world.ask_across(passages, first, second):
            assert passages[first].name in question.text
            assert passages[second].name not in question.text
            assert passages[second].name in passages[first].text
            assert question.answer in passages[second].text


def test_one_hop_is_asked_of_one_passage_that_alone_tells_of_its_subject():
    world = World("train")
    for _ in range(30):
        passages, asked, _ = world.context(5, 1)
        question = next(world.ask(passages, asked))
        assert question.positives == [asked]
        assert question.answer in passages[asked].text
        assert [passage.name for passage in passages].count(passages[asked].name) == 1
        # Another passage may name the subject as a value, but says nothing of it in a sentence of its own.
        others = [passage.text for index, passage in enumerate(passages) if index != asked]
        assert not any(f"{passages[asked].name}: " in text for text in others)


def test_distractors_share_parts_of_the_name():
    shared = 0
    for record in records("test", 40, two_hops=0):
        subject = record["positives"][0]
        world_name = next(
            word
            for word in record["query"].rstrip("?").split()
            if word[0].isupper() and word in record["documents"][subject]
        )
        shared += any(world_name in text for i, text in enumerate(record["documents"]) if i != subject)
    assert shared > 20


def test_splits_share_no_name():
    world = {split: World(split, 0) for split in SPLITS}
    for split in SPLITS:
        for kind in RELATIONS:
            name = world[split].value(kind)
            assert split_of(name) == split
            assert split_of(world[split].names.like(random.Random(0), kind, split, name)) == split


@pytest.mark.parametrize("kind", ["book", "ship"])
def test_books_and_ships_may_be_called_by_words_of_either(tokenizer, kind):
    drawn = {}
    for mixed in (0.0, 1.0):
        world = World("train", mixed_names=mixed)
        drawn[mixed] = {world.value(kind) for _ in range(3000)}
    known = set(NAME_PARTS[f"{kind}, first"].split()), set(NAME_PARTS[f"{kind}, last"].split())
    for mixed, names in drawn.items():
        assert all(split_of(name) == "train" for name in names)
        words = [name.removeprefix("The ").split() for name in names]
        assert all(first in known[0] and last in known[1] for first, last in words) == (mixed == 0)
        assert all(tokenizer.unk_token_id not in tokenizer(name)["input_ids"] for name in names)
    assert len(drawn[1.0]) > 2 * len(drawn[0.0])


def test_passages_fit_a_chunk_and_every_word_is_known(tokenizer):
    lengths = []
    for record in records("test", 40) + records("train", 40):
        for text in [*record["documents"], record["query"], record["answer"]]:
            assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]
        lengths += [len(tokenizer(text)["input_ids"]) for text in record["documents"]]
    assert max(lengths) <= 128
    assert 100 <= sum(lengths) / len(lengths) <= 130


def test_answers_come_back_as_they_were_written(tokenizer):
    for record in records("test", 60):
        ids = tokenizer(record["answer"])["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == record["answer"]
        place = record["documents"][record["positives"][-1]]
        assert set(ids) <= set(tokenizer(" ".join([place, *record["documents"]]))["input_ids"])


def test_unknown_words_are_spelled(tokenizer):
    ids = tokenizer("Ångström's zebra, 1234567")["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(tokenizer("1234567")["input_ids"]) == "1234567"


def test_two_hops_need_two_passages():
    with pytest.raises(ValueError, match="2 hops need as many passages; num_documents is 1"):
        World("train").context(1, 2)


@pytest.mark.parametrize("hops", [1, 2])
def test_distractors_of_the_kind_that_is_asked_about(hops):
    world = World("train")
    for _ in range(20):
        passages, first, second = world.context(5, hops, alike=True)
        kinds = {passage.kind for place, passage in enumerate(passages) if hops == 1 or place != first}
        assert kinds == {passages[second].kind}


@pytest.mark.parametrize("hops", [1, 2])
def test_passages_of_the_kind_that_is_asked_about_tell_the_same_facts(hops):
    world = World("train")
    for _ in range(20):
        passages, first, second = world.context(5, hops, alike=True, same_facts=True, num_facts=2, plain=True)
        told = {frozenset(passage.facts) for place, passage in enumerate(passages) if hops == 1 or place != first}
        assert told == {frozenset(passages[second].facts)}
        assert len(passages[second].facts) == 2


def test_some_records_only_ask_to_write_the_passage_again():
    world = World("train", 0)
    records = [world.record(i, 1, 0.0, repeats=0.5, num_facts=3, plain=True) for i in range(60)]
    repeated = [record for record in records if record["query"] == "What?"]
    assert 15 < len(repeated) < 45
    assert all(record["answer"] == record["documents"][0] for record in repeated)
    with pytest.raises(ValueError, match="needs num_documents=1"):
        world.record(0, 2, 0.0, repeats=0.5)


def test_lists_pair_every_name_with_what_its_own_passage_tells():
    world = World("train")
    first_places = set()
    for _ in range(30):
        passages, first, second = world.context(5, 2, alike=True, same_facts=True, num_facts=2, plain=True)
        question = next(world.ask_across(passages, first, second, everything=True))
        assert question.text.startswith("Who? ") and passages[second].name not in question.text
        entries = question.answer.split(", ")
        assert entries[0].startswith(passages[second].name)
        by_name = {passage.name: passage for place, passage in enumerate(passages) if place != first}
        listed = {name: entry for entry in entries for name in by_name if entry.startswith(f"{name} ")}
        assert set(listed) == set(by_name)
        for name, entry in listed.items():
            assert entry.removeprefix(f"{name} ") in by_name[name].facts.values()
        first_places.add([passage.name for passage in passages].index(list(listed)[1]))
    assert len(first_places) > 1


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split is 'dev'; it must be one of train, validation, test"):
        World("dev")


def test_labels_of_every_lesson_stand_at_what_can_be_answered(tokenizer):
    rng = random.Random(0)
    for lesson in Curriculum(tokenizer, 0).lessons():
        ids, labels, *_ = lesson.draw(rng)
        learned = [place for place, label in enumerate(labels) if label != -100]
        assert learned
        assert all(labels[place] == ids[place] for place in learned)
        ends = tokenizer.eos_token_id
        assert all(ids[place] in ids[:place] or ids[place] == ends for place in learned)


def test_lessons_draw_what_the_embedded_model_learned_from(tokenizer):
    drawn = {}
    for lesson in Curriculum(tokenizer, 0).lessons():
        rng = random.Random(0)
        rows = [lesson.draw(rng) for _ in range(3)]  # what a row draws too much shows in the next
        drawn[lesson.name] = zlib.crc32(repr([row.ids for row in rows]).encode())
    assert list(drawn.values())[-5:] == [3512575570, 1257302108, 816987097, 3117195988, 2155073188]
    assert drawn["2 long passages"] == 3308736936
    assert drawn["echo 16 segments"] == 938129650


def test_prompt_of_the_curriculum_is_the_processors_with_text_in_the_slots(tokenizer):
    from configuration_scaledown import ScaleDownConfig
    from processing_scaledown import ScaleDownProcessor
    from scaledown.world.tokenizer import SYSTEM_PROMPT

    model = build_generator(tokenizer, BackboneArguments(output="", hidden_size=32, num_layers=1))
    config = ScaleDownConfig(
        generator_config=model.config, compressor_type="n_layers", num_compressor_layers=1, system_prompt=SYSTEM_PROMPT
    )
    processor = ScaleDownProcessor.from_config(config, tokenizer)
    record = records("train", 1)[0]
    asked = [(record["query"], record["answer"])]
    ids, labels, *_ = Curriculum(tokenizer, 0).prompt(record["documents"], asked)
    texts = tokenizer(record["documents"])["input_ids"]
    batch = processor.build_prompts([record["query"]], [[len(text) for text in texts]], [record["answer"]])
    expected = batch["input_ids"][0].tolist()
    slots = batch["slot_mask"][0].tolist()
    assert [token for token, slot in zip(ids, slots, strict=True) if not slot] == [
        token for token, slot in zip(expected, slots, strict=True) if not slot
    ]
    assert labels == batch["labels"][0].tolist()


def test_questions_apart_are_read_as_if_each_were_alone(tokenizer):
    curriculum = Curriculum(tokenizer, 0)
    model = build_generator(tokenizer, BackboneArguments(output="", hidden_size=32, num_layers=2))
    documents = ["Griren Brurard kept a cat.", "Proud Petrel sailed in 1824."]
    asked = [("What pet did Griren Brurard have?", "cat"), ("When did Proud Petrel sail?", "1824")]
    together, *alone = (
        collate([curriculum.prompt(documents, some, gaps=[3, 40])], tokenizer.pad_token_id)
        for some in (asked, asked[:1], asked[1:])
    )
    logits, learned = read_causally(model, together)
    apart = [read_causally(model, row) for row in alone]
    assert torch.equal(learned, torch.cat([ids for _, ids in apart]))
    torch.testing.assert_close(logits, torch.cat([given for given, _ in apart]))
    first = together.positions[0].tolist()
    assert first[: len(curriculum.before) + 1] == [*range(len(curriculum.before)), len(curriculum.before) + 3]
    # What one question says changes nothing for the other, though it stands in front of it.
    ids = together.ids.clone()
    ids[together.groups == 1] = tokenizer.bos_token_id
    changed, _ = read_causally(model, together._replace(ids=ids))
    torch.testing.assert_close(changed[len(apart[0][1]) :], apart[1][0])


def test_without_gaps_a_question_apart_is_the_question_alone(tokenizer):
    curriculum = Curriculum(tokenizer, 0)
    arguments = ["Griren Brurard kept a cat."], [("What pet did Griren Brurard have?", "cat")]
    apart, alone = curriculum.prompt(*arguments, gaps=[0]), curriculum.prompt(*arguments)
    assert apart[:3] == alone[:3]
    assert alone.positions == list(range(len(alone.ids)))


def test_a_stopped_training_goes_on_behind_its_last_lesson(tokenizer, tmp_path):
    args = BackboneArguments(output=str(tmp_path), hidden_size=32, num_layers=1, lesson_steps=2)
    lessons = Curriculum(tokenizer, 0).lessons()[:3]
    teach(build_generator(tokenizer, args), lessons[:2], args, read_causally)
    report = teach(build_generator(tokenizer, args), lessons, args, read_causally)
    assert [entry["lesson"] for entry in report] == [lesson.name for lesson in lessons]
    assert json.loads((tmp_path / "training.json").read_text()) == report


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_lessons_are_drawn_wherever_processes_start_otherwise(method, tmp_path):
    """As on Windows and macOS, and since Python 3.14; the process that learns keeps its threads."""
    script = f"""
    import multiprocessing, sys

    multiprocessing.set_start_method("spawn")  # to which lessons cannot be sent
    if {method!r} == "spawn":
        multiprocessing.get_all_start_methods = lambda: ["spawn"]
    sys.path.insert(0, {str(ROOT)!r})
    import torch
    from scaledown.world.curriculum import Curriculum
    from scaledown.world.generator import build_generator, read_causally
    from scaledown.world.teaching import BackboneArguments, teach
    from scaledown.world.tokenizer import build_tokenizer

    torch.set_num_threads(2)
    tokenizer = build_tokenizer()
    args = BackboneArguments(output={str(tmp_path)!r}, hidden_size=32, num_layers=1, lesson_steps=1)
    teach(build_generator(tokenizer, args), Curriculum(tokenizer, 0).lessons()[:1], args, read_causally)
    assert torch.get_num_threads() == 2
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "training.json").is_file()


def test_an_encoder_does_not_see_what_it_learns():
    tokenizer = encoder_tokenizer()
    args = BackboneArguments(output="", hidden_size=32, num_layers=1)
    model = build_encoder(tokenizer, args)
    read, masks = [], []

    def keep(module, inputs, kwargs):
        read.append(inputs[0])
        masks.append(kwargs["attention_mask"])

    model.model.register_forward_pre_hook(keep, with_kwargs=True)
    lesson = EncoderCurriculum(tokenizer, 0).lessons()[-1]
    batch = next(iter(Rows(lesson, 0, tokenizer.pad_token_id)))
    logits, learned = read_masked(model, batch)
    ids, labels, *_ = batch
    known = labels != -100
    assert (read[0][known] == model.config.mask_token_id).all()
    assert (read[0][~known] == ids[~known]).all()
    assert not (ids == model.config.mask_token_id).any()
    first, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    for row, mask in zip(ids.tolist(), masks[0].tolist(), strict=True):  # from the first token to the last, no padding
        assert row[0] == first
        assert row[sum(mask) - 1] == end
        assert mask == [1] * sum(mask) + [0] * (len(row) - sum(mask))
    assert not masks[0].all()
    assert logits.shape == (int(known.sum()), len(tokenizer))
    assert (learned == ids[known]).all()
