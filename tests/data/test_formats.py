"""Data sets as distributed: Natural Questions, TriviaQA, MS MARCO, PopQA, BioASQ and any table."""

import gzip
import json
from pathlib import Path

import datasets
import pytest

from scaledown.common.reading import RecordError
from scaledown.data.preparation import PreparationArguments, prepare
from scaledown.data.readers import Columns, SourceError, read_source
from scaledown.data.records import read_records

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture(autouse=True)
def _private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write(path: Path, value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    path.write_text(text, "utf-8")
    return str(path)


def hub_folder(path: Path, rows: list[dict]) -> str:
    """A folder that `datasets.load_dataset` opens like a name on the Hub."""
    path.mkdir()
    datasets.Dataset.from_list(rows).to_parquet(path / "train.parquet")
    return str(path)


def only_question(source: str, **settings):
    (question,) = read_source(source, **settings).questions
    return question


def test_natural_questions_as_qed_has_them(tmp_path):
    flat = {"id": "7", "question": "who?", "title": "Ada", "paragraph": "She wrote it .", "answers": ["Ada", "Ada"]}
    original = {
        "example_id": 7,
        "question_text": "who?",
        "title_text": "Ada",
        "paragraph_text": "She wrote it .",
        "original_nq_answers": [[{"start": 0, "end": 3, "string": "Ada"}], [{"start": 0, "end": 3, "string": "Ada"}]],
    }
    questions = [only_question(write(tmp_path / f"{i}.jsonl", row)) for i, row in enumerate((flat, original))]
    assert questions[0] == questions[1]
    assert questions[0].positives == ["Ada: She wrote it ."]
    assert questions[0].answers == ["Ada"]
    assert read_source(write(tmp_path / "x.jsonl", {**flat, "answers": []}), require_answer=False).questions


@pytest.mark.parametrize(
    ("row", "passages", "answers"),
    [
        ({"question": "q", "title": 1984, "paragraph": "By Orwell.", "answers": ["x"]}, ["1984: By Orwell."], ["x"]),
        ({"body": "q", "type": "yesno", "exact_answer": "yes", "snippets": "One text."}, ["One text."], ["yes"]),
        ({"body": "q", "exact_answer": "yes", "snippets": {"text": "One text."}}, ["One text."], ["yes"]),
        ({"question": "q", "answer": {"value": 1984, "aliases": "MCMLXXXIV"}}, [], ["1984", "MCMLXXXIV"]),
        ({"question": "q", "answers": ["x"], "ctxs": "One text."}, ["One text."], ["x"]),
        ({"question": "q", "answers": ["x"], "ctxs": {"title": ["T"], "text": ["One."]}}, ["T: One."], ["x"]),
    ],
    ids=["title", "snippet", "object", "alias", "passage", "columns"],
)
def test_numbers_and_single_texts_may_stand_where_texts_and_lists_are_usual(tmp_path, row, passages, answers):
    source = read_source(write(tmp_path / "rows.jsonl", [row]))
    assert source.passages == passages
    assert source.questions[0].answers == answers


@pytest.mark.parametrize(
    "row",
    [
        {"body": "q", "type": "yesno", "exact_answer": "yes", "snippets": {"a": 1}},
        {"question": "q", "answer": {"value": "v", "aliases": {"a": 1}}},
    ],
    ids=["snippet", "alias"],
)
def test_what_is_no_text_is_named_with_its_place(tmp_path, row):
    with pytest.raises(SourceError, match=r"rows\.jsonl, element 1, (answer|aliases|snippets): found"):
        read_source(write(tmp_path / "rows.jsonl", [row]))


def test_triviaqa(tmp_path):
    page = " ".join(f"word{index}" for index in range(150))
    row = {
        "question": "Who?",
        "question_id": "tc_1",
        "entity_pages": {"title": ["Ada"], "wiki_context": [page], "filename": ["a.txt"], "doc_source": ["wiki"]},
        "search_results": {"title": ["Web"], "search_context": ["Short."], "rank": [1], "url": ["u"]},
        "answer": {"value": "Ada", "aliases": ["Ada", "Lady Lovelace"], "normalized_aliases": ["ada"]},
    }
    question = only_question(hub_folder(tmp_path / "hub", [row]))
    assert question.id == "tc_1"
    assert question.answers == ["Ada", "Lady Lovelace"]
    assert question.positives is None
    # A page of 150 words is two passages of 96 words at most, the title in each.
    first, second, web = question.candidates
    assert first.startswith("Ada: word0 ") and second.startswith("Ada: word75 ") and web == "Web: Short."
    original = {
        "Data": [
            {
                "Question": "Who?",
                "QuestionId": "tc_1",
                "Answer": {"Value": "Ada", "Aliases": ["Ada", "Lady Lovelace"]},
                "EntityPages": [{"Title": "Ada", "Filename": "a.txt"}],
            }
        ],
        "Version": 1.0,
    }
    question = only_question(write(tmp_path / "original.json", original))
    assert (question.answers, question.candidates) == (["Ada", "Lady Lovelace"], [])
    hidden = [{**row, "answer": {"value": "<unk>", "aliases": []}}]
    assert read_source(hub_folder(tmp_path / "test", hidden)).dropped == {"no_answer": ["tc_1"]}


def test_msmarco(tmp_path):
    rows = [
        {
            "query": "what is a heron",
            "query_id": 3,
            "answers": ["A bird"],
            "passages": {"passage_text": ["A heron is a bird.", "No."], "is_selected": [1, 0], "url": ["u", "v"]},
        },
        {
            "query": "what is it",
            "query_id": 4,
            "answers": ["No Answer Present."],
            "passages": {"passage_text": ["A.", "B."], "is_selected": [0, 0], "url": ["u", "v"]},
        },
    ]
    source = read_source(hub_folder(tmp_path / "hub", rows))
    assert source.questions[0].positives == ["A heron is a bird."]
    assert source.questions[0].candidates == ["A heron is a bird.", "No."]
    assert source.dropped == {"no_answer": ["4"]}
    # A teacher can answer what the annotators could not.
    unanswered = read_source(str(tmp_path / "hub"), require_answer=False).questions[1]
    assert (unanswered.answers, unanswered.positives) == ([], None)
    original = {
        name: {
            str(index): [dict(zip(row[name], values, strict=True)) for values in zip(*row[name].values(), strict=True)]
            if name == "passages"
            else row[name]
            for index, row in enumerate(rows)
        }
        for name in rows[0]
    }
    assert read_source(write(tmp_path / "train_v2.1.json", original)) == source
    assert read_source(write(tmp_path / "spread.json", json.dumps(original, indent=1))) == source


def test_popqa(tmp_path):
    row = {"id": 42, "question": "What is Ada's occupation?", "possible_answers": '["poet", "écrivain"]', "subj": "Ada"}
    question = only_question(hub_folder(tmp_path / "hub", [row]))
    assert (question.id, question.answers) == ("42", ["poet", "écrivain"])
    tsv = 'id\tsubj\tquestion\tpossible_answers\n42\tAda\tWhat is Ada\'s occupation?\t"[""poet"", ""écrivain""]"\n'
    assert only_question(write(tmp_path / "test.tsv", tsv)) == question


def test_bioasq(tmp_path):
    questions = [
        {"id": "f", "body": "Gene?", "type": "factoid", "exact_answer": [["BRCA1", "RNF53"]], "ideal_answer": ["It."]},
        {"id": "l", "body": "Which?", "type": "list", "exact_answer": [["A", "a1"], ["B"]]},
        {"id": "y", "body": "Is it?", "type": "yesno", "exact_answer": "yes"},
        {"id": "s", "body": "Describe.", "type": "summary", "ideal_answer": ["A long answer."]},
    ]
    for question in questions:
        question["snippets"] = [{"text": f"Snippet of {question['id']}.", "document": "http://pubmed/1"}]
    source = read_source(write(tmp_path / "training12b.json", {"questions": questions}))
    assert source.format == "bioasq"
    assert [question.answers for question in source.questions] == [
        ["BRCA1", "RNF53"],
        ["A, B", "A", "a1", "B"],
        ["yes"],
        ["A long answer."],
    ]
    assert source.questions[0].positives == ["Snippet of f."]
    flat = [{**question, "snippets": [snippet["text"] for snippet in question["snippets"]]} for question in questions]
    lines = "".join(json.dumps(question) + "\n" for question in flat)
    assert read_source(write(tmp_path / "flat.jsonl", lines)).questions == source.questions


@pytest.mark.parametrize("kind", ["jsonl", "csv", "csv.gz", "tsv", "parquet"])
def test_any_table_with_named_columns(tmp_path, kind):
    rows = [
        {
            "frage": "Who, exactly?",
            "antwort": ["Ada", "A. L."],
            "texte": ['Ada "the" first.', "Rain,\nmostly."],
            "nr": "a",
        },
        {"frage": "When?", "antwort": ["1843"], "texte": [], "nr": "b"},
    ]
    path = tmp_path / f"in.{kind}"
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif kind == "jsonl":
        write(path, "".join(json.dumps(row) + "\n" for row in rows))
    else:
        table = "\ufefffrage,antwort,texte,nr\n" + "".join(
            ",".join('"' + (v if isinstance(v, str) else json.dumps(v)).replace('"', '""') + '"' for v in row.values())
            + "\n"
            for row in rows
        )
        if kind == "tsv":
            table = table.replace('","', '"\t"').replace("frage,antwort,texte,nr", "frage\tantwort\ttexte\tnr")
        path.write_bytes(gzip.compress(table.encode()) if kind.endswith("gz") else table.encode())
    output = tmp_path / "out.jsonl"
    columns = {"question_column": "frage", "answer_column": "antwort", "documents_column": "texte", "id_column": "nr"}
    prepare(PreparationArguments(str(path), str(output), **columns))
    records = list(read_records(output))
    assert [(r["id"], r["query"], r["answer"], r["documents"]) for r in records] == [
        (row["nr"], row["frage"], row["antwort"], row["texte"]) for row in rows
    ]


def test_a_plain_table_needs_no_names(tmp_path):
    source = read_source(write(tmp_path / "in.csv", "question,answer\nWho?,Ada\nWhen?,\n ,x\n"))
    assert [(q.id, q.query, q.answers) for q in source.questions] == [("0", "Who?", ["Ada"])]
    assert source.dropped == {"no_answer": ["1"], "empty_question": ["2"]}


@pytest.mark.parametrize(
    ("cell", "texts"),
    [
        ('["a", "b"]', ["a", "b"]),
        # As pandas writes a column of lists.
        ("['a', \"b's\",\n 'c']", ["a", "b's", "c"]),
        ("[1990, 1991.5]", ["1990", "1991.5"]),
        # What is no list stays text: a sound, a citation, a matrix.
        ("[Applause]", ["[Applause]"]),
        ("[1] Scott, W. Ivanhoe.", ["[1] Scott, W. Ivanhoe."]),
        ("[[1, 2], [3, 4]]", ["[[1, 2], [3, 4]]"]),
    ],
)
def test_a_list_in_a_cell_is_a_list_and_other_text_in_brackets_is_text(tmp_path, cell, texts):
    quoted = cell.replace('"', '""')
    path = write(tmp_path / "in.csv", f'question,documents,answer\nWho?,"{quoted}","{quoted}"\n')
    question = only_question(path)
    assert question.candidates == texts and question.answers == texts


def test_a_table_may_name_its_columns_like_records_or_ms_marco(tmp_path):
    table = write(tmp_path / "in.csv", 'query,documents,answer\nWho?,"[""One."", ""Two.""]",Ada\n')
    lines = write(tmp_path / "in.jsonl", {"query": "Who?", "passages": ["One.", "Two."], "answer": "Ada"})
    for path, format in ((table, "records"), (lines, "columns")):
        source = read_source(path)
        assert source.format == format
        assert [(q.query, q.candidates, q.answers) for q in source.questions] == [("Who?", ["One.", "Two."], ["Ada"])]


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("a.csv", "question,answer\nWho?,Ada,too many\n", SourceError, "line 2: found 3 fields, expected 2"),
        ("a.csv", "question,answer\nWho?\n", SourceError, "line 2: found 1 fields, expected 2"),
        ("a.csv", 'question,answer\nWho?,"Ada\n', SourceError, "line .: found a broken row"),
        (
            "a.csv",
            "text,label\nWho?,Ada\n",
            SourceError,
            "line 2: found the keys text, label; expected .*question_column",
        ),
        ("a.parquet", "PAR1 and no more", RecordError, "damaged Parquet"),
        ("a.jsonl", '{"question": "q", "paragraph": 5}', SourceError, "line 1: found paragraph 5; expected a string"),
        ("a.jsonl", '{"query": "q", "passages": 5, "answers": []}', SourceError, "line 1, passages: found 5"),
        ("a.jsonl", '{"question": "q", "possible_answers": true}', SourceError, "found True; expected a text"),
        ("a.jsonl", '{"body": "q", "exact_answer": 5}', SourceError, "found the answer 5"),
        ("a.jsonl", '{"query": "q", "passages": {"passage_text": ["a"], "is_selected": []}}', SourceError, "lengths"),
    ],
)
def test_what_does_not_fit_is_named_with_its_place(tmp_path, name, content, error, message):
    with pytest.raises(error, match=message):
        read_source(write(tmp_path / name, content))


def test_a_table_in_another_encoding_names_the_line(tmp_path):
    (tmp_path / "in.csv").write_bytes("question,answer\nWho?,Ada\nCafé?,x\n".encode("latin-1"))
    with pytest.raises(RecordError, match=r"in.csv, line 3: found the byte 0xe9 .*iconv"):
        read_source(str(tmp_path / "in.csv"))


def test_wrong_column_names_are_refused(tmp_path):
    path = write(tmp_path / "in.csv", "q,a\nWho?,Ada\n")
    with pytest.raises(
        SourceError, match=r"found the columns q, a; expected 'frage', the question. Correct --question_c"
    ):
        read_source(path, columns=Columns(question="frage"))
    with pytest.raises(SourceError, match="columns of its own"):
        read_source(path, format="squad", columns=Columns(question="q"))


def test_an_empty_answer_among_records_is_a_counted_skip(tmp_path):
    answers = {"x": "a", "y": "", "z": [" "]}
    rows = [{"query": "q", "documents": ["d"], "answer": answer, "id": name} for name, answer in answers.items()]
    report = prepare(
        PreparationArguments(
            write(tmp_path / "in.jsonl", "\n".join(map(json.dumps, rows))), str(tmp_path / "out.jsonl")
        )
    )
    assert report["dropped"] == {"no_answer": {"count": 2, "examples": ["y", "z"]}}


def test_what_cannot_be_seen_is_empty(tmp_path):
    invisible = "\u200b\ufeff \u200d"
    rows = [
        {"question": "q", "answer": "a", "documents": ["d", invisible]},
        {"question": invisible, "answer": "a", "documents": ["d"]},
        {"question": "q", "answer": invisible, "documents": ["d"]},
    ]
    source = read_source(write(tmp_path / "in.jsonl", "\n".join(map(json.dumps, rows))))
    assert [question.candidates for question in source.questions] == [["d"]]
    assert source.dropped == {"empty_question": ["1"], "no_answer": ["2"]}
    squad = {"id": "s", "question": "q", "context": invisible, "answers": {"text": ["a"], "answer_start": [0]}}
    assert read_source(write(tmp_path / "squad.jsonl", squad)).dropped == {"empty_passage": ["s"]}


def test_questions_without_passages_ask_for_a_corpus(tmp_path):
    path = write(tmp_path / "in.jsonl", {"question": "q", "possible_answers": '["a"]'})
    with pytest.raises(ValueError, match=r"1 questions and not one passage.*--documents_column.*--corpus"):
        prepare(PreparationArguments(path, str(tmp_path / "out.jsonl")))


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="the real data sets are not here")
def test_real_natural_questions(tmp_path):
    arguments = PreparationArguments(str(DATA / "nq" / "qed-train.jsonl"), str(tmp_path / "out.jsonl"), num_examples=30)
    report = prepare(arguments)
    assert report["format"] == "nq"
    assert report["counts"]["questions_read"] == 7167
    assert report["dropped"]["no_answer"]["count"] == 20
    for record in read_records(arguments.output):
        assert len(set(record["documents"])) == 5
        gold = record["documents"][record["positives"][0]]
        assert any(" ".join(answer.split()) in gold for answer in record["answer"])
