"""The formats of question-answering data sets: each reads one element of its source into a collector.

| format     | what is read                                                                                          |
| ---------- | ----------------------------------------------------------------------------------------------------- |
| `squad`    | the original JSON (`data` / `paragraphs` / `qas`), `{context, qas}` as MRQA has it, rows of `datasets` |
| `hotpotqa` | the original JSON (`context` as pairs) and rows of `datasets` (`context` as columns), array or lines   |
| `nq`       | Natural Questions with one paragraph each, as in QED: its original file, or `{question, paragraph, …}` |
| `triviaqa` | rows of `datasets` (`rc`, `rc.nocontext`, `unfiltered`), the original JSON (questions only)            |
| `msmarco`  | rows of `datasets` (`v1.1`, `v2.1`), the original JSON                                                 |
| `popqa`    | rows of `datasets`, the original TSV: questions only                                                   |
| `bioasq`   | the original JSON with snippets, or lines of the same fields                                           |
| `musique`  | the original lines: paragraphs of which some support the answer                                        |
| `boolq`    | the original lines, and rows of `datasets`: a question of yes or no and its passage                    |
| `pubmedqa` | the original JSON by id, and rows of `datasets`                                                        |
| `dpr`      | what retrievers write and readers learn from: `ctxs` (DPR, FiD), or `positive_ctxs` and the others     |
| `columns`  | any rows with columns for question, answer, documents and id                                           |
| `records`  | the project's own                                                                                      |
"""

import math
from typing import Any

from ..common.choices import FORMATS, Columns
from ..common.text import is_blank
from .delimited import decode_cell
from .own_formats import (
    ANSWER_COLUMNS,
    DOCUMENTS_COLUMNS,
    ID_COLUMNS,
    QUESTION_COLUMNS,
    add_columns,
    add_dpr,
    add_record,
    read_record,
)
from .questions import (
    QuestionCollector,
    SourceError,
    as_items,
    as_mapping,
    as_rows,
    as_texts,
    get_field,
    get_identifier,
    is_true,
    titled,
)

__all__ = ["FORMATS", "OWN_DOCUMENTS", "Columns", "add_element", "detect_format", "read_record"]

# Here the source itself says which documents belong to a question, so they are kept unless others are asked for.
OWN_DOCUMENTS = ("columns", "records", "dpr")
NO_ANSWER = "No Answer Present."
# Where each format has its questions, answers and passages, under the first of the names that is there.
FIELDS = {
    "squad": (("question", "qas", "paragraphs"), ("answers", "answer", "qas", "paragraphs"), ("context", "paragraphs")),
    "hotpotqa": (("question",), ("answer",), ("context",)),
    "nq": (
        ("question_text", "question"),
        ("original_nq_answers", "answers", "answer"),
        ("paragraph_text", "paragraph"),
    ),
    "triviaqa": (("Question", "question"), ("Answer", "answer"), ("entity_pages", "search_results")),
    "msmarco": (("query",), ("answers",), ("passages",)),
    "popqa": (("question",), ("possible_answers",), ()),
    "bioasq": (("body",), ("exact_answer", "ideal_answer"), ("snippets",)),
    "musique": (("question",), ("answer",), ("paragraphs",)),
    "boolq": (("question",), ("answer", "label"), ("passage",)),
    "pubmedqa": (("QUESTION", "question"), ("final_decision", "LONG_ANSWER", "long_answer"), ("CONTEXTS", "context")),
    "dpr": (("question", "query"), ("answers", "answer"), ("ctxs", "positive_ctxs")),
    "records": (("query",), ("answer",), ("documents",)),
}


def detect_format(location: str, element: Any) -> str:
    """Tell a format from one element of the source.

    Args:
        location: Where the element comes from, for the message.
        element: An article, a paragraph, a question or a record.

    Returns:
        One of `FORMATS`.

    Raises:
        SourceError: The element fits none.
    """
    element = as_mapping(element, location)
    keys = element.keys()
    # A column of texts, as Parquet may have one, spells the list.
    if {"query", "documents"} <= keys and not isinstance(element["documents"], str):
        return "records"
    if {"question", "paragraphs"} <= keys:
        return "musique"
    if "paragraphs" in keys or {"context", "qas"} <= keys:
        return "squad"
    if not {"question", "query"}.isdisjoint(keys) and not {"ctxs", "positive_ctxs"}.isdisjoint(keys):
        return "dpr"
    context = element.get("context")
    if {"QUESTION", "CONTEXTS"} <= keys or ("question" in keys and isinstance(context, dict) and "contexts" in context):
        return "pubmedqa"
    if {"question", "context"} <= keys:
        # SQuAD's context is one text, HotpotQA's are ten paragraphs of sentences.
        if isinstance(context, str):
            return "squad"
        return "columns" if isinstance(context, list) and _are_texts(context) else "hotpotqa"
    if {"question", "passage"} <= keys and _is_truth_value(element.get("answer", element.get("label"))):
        return "boolq"
    if {"question", "paragraph"} <= keys or {"question_text", "paragraph_text"} <= keys:
        return "nq"
    if isinstance(element.get("Answer"), dict) or ("question" in keys and isinstance(element.get("answer"), dict)):
        return "triviaqa"
    if {"query", "passages"} <= keys and not _are_texts(element["passages"]):
        return "msmarco"
    if {"question", "possible_answers"} <= keys:
        return "popqa"
    if "body" in keys and not {"exact_answer", "ideal_answer", "snippets"}.isdisjoint(keys):
        return "bioasq"
    lower = {str(key).lower() for key in keys}
    if not lower.isdisjoint(QUESTION_COLUMNS) and not lower.isdisjoint((*ANSWER_COLUMNS, *DOCUMENTS_COLUMNS)):
        return "columns"
    raise SourceError(
        f"{location}: found the keys {', '.join(map(str, element)) or '(none)'}; expected those of SQuAD (paragraphs, "
        f"or context and qas, or question, context and answers), HotpotQA (question, context, supporting_facts), "
        f"Natural Questions (question, paragraph, answers), TriviaQA (question, answer with a value), MS MARCO (query, "
        f"passages, answers), PopQA (question, possible_answers), BioASQ (body, exact_answer, snippets), MuSiQue "
        f"(question, paragraphs), BoolQ (question, passage, answer), PubMedQA (question, context, final_decision), DPR "
        f"(question, answers, ctxs) or the project's records (query, documents, answer). The first line of a table "
        f"names its columns; name those of another table with --question_column, --answer_column and "
        f"--documents_column, or convert the file to records."
    )


def add_element(
    collector: QuestionCollector, element: Any, location: str, default_id: str, columns: Columns | None = None
) -> None:
    """Read one element of the collector's format.

    Args:
        collector: Takes the questions and passages.
        element: What the source holds at this place.
        location: Where that is, for messages.
        default_id: The id of a question that has none.
        columns: Names of columns, for the format `columns`.

    Raises:
        SourceError: The element does not fit the format.
        RecordError: A record breaks the project's format.
    """
    # What pandas has in the place of a missing value.
    element = {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in as_mapping(element, location).items()
    }
    collector.location = location
    format = collector.source.format
    if format == "columns":
        add_columns(collector, element, location, default_id, columns or Columns())
        return
    if not collector.source.columns:
        meanings = zip(("question", "answer", "documents"), FIELDS[format], strict=True)
        collector.note_columns(
            {meaning: next((name for name in names if name in element), None) for meaning, names in meanings}
        )
    _READERS[format](collector, element, location, default_id)


def _add_squad(collector: QuestionCollector, element: dict[str, Any], location: str, default_id: str) -> None:
    if "paragraphs" in element:
        for index, paragraph in enumerate(get_field(element, "paragraphs", list, location), start=1):
            place = f"{location}, paragraph {index}"
            _add_squad_paragraph(collector, as_mapping(paragraph, place), place, f"{default_id}-{index - 1}")
    elif "qas" in element:
        _add_squad_paragraph(collector, element, location, default_id)
    else:
        passage = collector.add_passage(get_field(element, "context", str, location))
        _add_squad_question(collector, element, passage, location, default_id)


def _add_squad_paragraph(
    collector: QuestionCollector, paragraph: dict[str, Any], location: str, default_id: str
) -> None:
    passage = collector.add_passage(get_field(paragraph, "context", str, location))
    qas = []
    for index, qa in enumerate(get_field(paragraph, "qas", list, location), start=1):
        place = f"{location}, question {index}"
        qas.append((place, f"{default_id}-{index - 1}", as_mapping(qa, place)))
    for place, identifier, qa in _merge_repeated(collector, qas):
        _add_squad_question(collector, qa, passage, place, identifier)


def _merge_repeated(
    collector: QuestionCollector, qas: list[tuple[str, str, dict[str, Any]]]
) -> list[tuple[str, str, dict[str, Any]]]:
    """Questions without an id that repeat within a paragraph become one, with the answers of all."""
    merged: dict[str, tuple[str, str, dict[str, Any]]] = {}
    for place, identifier, qa in qas:
        if not set(ID_COLUMNS).isdisjoint(qa):
            merged[place] = (place, identifier, qa)
            continue
        key = get_field(qa, "question", str, place).strip()
        if key in merged:
            merged[key][2]["answers"] += _squad_answers(qa, place)
            collector.drop("merged_into_same_question", identifier)
        else:
            merged[key] = (place, identifier, {**qa, "answers": _squad_answers(qa, place)})
    return list(merged.values())


def _add_squad_question(
    collector: QuestionCollector, qa: dict[str, Any], passage: str | None, location: str, default_id: str
) -> None:
    identifier = get_identifier(qa, default_id)
    if is_true(qa.get("is_impossible"), "is_impossible", location):
        collector.drop("unanswerable", identifier)
    elif passage is None:
        collector.drop("empty_passage", identifier)
    else:
        answers = _squad_answers(qa, location)
        if not answers and ("answers" in qa or "answer" in qa):  # how `datasets` has SQuAD 2's unanswerable ones
            collector.drop("unanswerable", identifier)
            return
        collector.add_question(identifier, get_field(qa, "question", str, location), answers, [passage], [])


def _squad_answers(qa: dict[str, Any], location: str) -> list[str]:
    answers = qa.get("answers", qa.get("answer"))
    if answers is None:
        return []
    if isinstance(answers, str):
        answers = [answers]
    elif isinstance(answers, dict):
        answers = get_field(answers, "text", list, f"{location}, answers")
    if isinstance(answers, list):
        answers = [answer.get("text") if isinstance(answer, dict) else answer for answer in answers]
        if all(isinstance(answer, str) for answer in answers):
            return answers
    raise SourceError(
        f"{location}: found the answers {str(answers)[:60]}; expected texts, or objects with a text. Correct the file."
    )


def _add_hotpotqa(collector: QuestionCollector, element: dict[str, Any], location: str, default_id: str) -> None:
    identifier = get_identifier(element, default_id)
    passages: dict[str, list[str]] = {}
    for title, sentences in _pairs(element, "context", "title", "sentences", location):
        if not isinstance(sentences, list) or not all(isinstance(sentence, str) for sentence in sentences):
            raise SourceError(f"{location}: found the sentences {str(sentences)[:60]}; expected a list of strings.")
        # Sentences carry their own leading blanks. The title goes in front because it names the entity, which the
        # paragraph itself often calls only "he" or "the film", and which leads from one paragraph to the other.
        text = "".join(sentences).strip()
        passage = collector.add_passage(f"{title}: {text}") if not is_blank(text) else None
        if passage is not None:
            passages.setdefault(str(title), []).append(passage)
    query = get_field(element, "question", str, location)
    answer = element.get("answer") or ""
    if not isinstance(answer, str):
        raise SourceError(f"{location}: found the answer {str(answer)[:60]}; expected a string. Correct the file.")
    # Repeated titles of supporting facts are several sentences of one paragraph.
    facts = element.get("supporting_facts") or []
    titles = dict.fromkeys(str(title) for title, _ in _pairs({"facts": facts}, "facts", "title", "sent_id", location))
    if answer and not titles:
        collector.drop("no_supporting_facts", identifier)
    elif any(title not in passages for title in titles):
        collector.drop("supporting_fact_not_in_context", identifier)
    else:
        positives = list(dict.fromkeys(passage for title in titles for passage in passages[title]))
        candidates = [passage for group in passages.values() for passage in group]
        # The test split hides its supporting facts; that none is known is not that there is none.
        collector.add_question(identifier, query, [answer], positives if titles else None, candidates)


def _pairs(element: dict[str, Any], name: str, first: str, second: str, location: str) -> list[tuple[Any, Any]]:
    """Pairs, whether stored as pairs (original file) or as two columns (rows of `datasets`)."""
    value = element.get(name)
    if isinstance(value, dict):
        columns = get_field(value, first, list, location), get_field(value, second, list, location)
        if len(columns[0]) == len(columns[1]):
            return list(zip(*columns, strict=True))
    elif isinstance(value, list) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in value):
        return [tuple(pair) for pair in value]
    raise SourceError(
        f"{location}: found {name} {str(value)[:60]}; expected [{first}, {second}] pairs or two lists of one length "
        f"under {first} and {second}. Correct the file, or its --format."
    )


def _add_nq(collector: QuestionCollector, element: dict[str, Any], location: str, default_id: str) -> None:
    original = "paragraph_text" in element
    text = get_field(element, "paragraph_text" if original else "paragraph", str, location).strip()
    query = get_field(element, "question_text" if original else "question", str, location)
    identifier = get_identifier(element, default_id, "id", "example_id")
    title = str(element.get("title_text" if original else "title") or "")
    answers = element.get("original_nq_answers" if original else "answers", element.get("answer"))
    # The original lists one list of spans per annotator.
    answers = list(_strings(answers, location))
    passage = collector.add_passage(titled(title, text) if not is_blank(text) else "")
    if passage is None:
        collector.drop("empty_passage", identifier)
    else:
        collector.add_question(identifier, query, answers, [passage], [])


def _add_triviaqa(collector: QuestionCollector, element: dict[str, Any], location: str, default_id: str) -> None:
    if "Question" in element:  # the original file names the evidence's files, but does not hold it
        answer = get_field(element, "Answer", dict, location)
        value, aliases = answer.get("Value"), answer.get("Aliases")
        query, identifier = (
            get_field(element, "Question", str, location),
            get_identifier(element, default_id, "QuestionId"),
        )
    else:
        answer = get_field(element, "answer", dict, location)
        value, aliases = answer.get("value"), answer.get("aliases")
        query = get_field(element, "question", str, location)
        identifier = get_identifier(element, default_id, "question_id", "id")
    # The hidden answers of the test split are spelt so.
    answers = as_texts(value, f"{location}, answer") + as_texts(aliases, f"{location}, aliases")
    answers = [text for text in answers if text != "<unk>"]
    candidates = []
    if collector.keep_pool:
        for pages, text in (("entity_pages", "wiki_context"), ("search_results", "search_context")):
            for page in as_rows(element.get(pages), f"{location}, {pages}"):
                # Whole pages: cut like a corpus, so that the best of their passages can be chosen.
                passages = collector.split(str(page.get("title") or ""), str(page.get(text) or ""))
                candidates += collector.add_passages(passages)
    collector.add_question(identifier, query, answers, None, candidates)


def _add_msmarco(collector: QuestionCollector, element: dict[str, Any], location: str, default_id: str) -> None:
    rows = as_rows(element.get("passages"), f"{location}, passages")
    passages = [(collector.add_passage(get_field(row, "passage_text", str, location)), row) for row in rows]
    answers = [answer for answer in as_texts(element.get("answers"), location) if answer != NO_ANSWER]
    positives = [
        passage
        for passage, row in passages
        if passage is not None and is_true(row.get("is_selected"), "is_selected", location)
    ]
    collector.add_question(
        get_identifier(element, default_id, "query_id", "id"),
        get_field(element, "query", str, location),
        answers,
        # No passage was selected where the annotator found no answer, which says nothing about the others.
        positives or None,
        [passage for passage, _ in passages if passage is not None],
    )


def _add_popqa(collector: QuestionCollector, element: dict[str, Any], location: str, default_id: str) -> None:
    answers = as_texts(_decoded(element.get("possible_answers"), location), location)
    query = get_field(element, "question", str, location)
    collector.add_question(get_identifier(element, default_id), query, answers, None, [])


def _add_bioasq(collector: QuestionCollector, element: dict[str, Any], location: str, default_id: str) -> None:
    snippets = as_items(element.get("snippets"), f"{location}, snippets")
    texts = [snippet.get("text") if isinstance(snippet, dict) else snippet for snippet in snippets]
    passages = collector.add_passages(as_texts(texts, f"{location}, snippets"))
    exact = element.get("exact_answer")
    answers = []
    if element.get("type") == "list" and isinstance(exact, list):
        # Each item lists its synonyms. The answer to learn is the whole list; each item alone counts as gold too.
        items = [list(_strings(item, location)) for item in exact]
        answers.append(", ".join(item[0] for item in items if item))
    answers += list(_strings(exact, location)) or list(_strings(element.get("ideal_answer"), location))
    query = get_field(element, "body", str, location)
    collector.add_question(get_identifier(element, default_id), query, answers, passages or None, [])


def _add_musique(collector: QuestionCollector, element: dict[str, Any], location: str, default_id: str) -> None:
    identifier = get_identifier(element, default_id)
    if not is_true(element.get("answerable", True), "answerable", location):
        collector.drop("unanswerable", identifier)
        return
    positives, candidates, told = [], [], False
    for row in as_rows(element.get("paragraphs"), f"{location}, paragraphs"):
        text = get_field(row, "paragraph_text", str, f"{location}, paragraphs")
        passage = collector.add_passage(titled(str(row.get("title") or ""), text) if not is_blank(text) else "")
        told = told or "is_supporting" in row  # the test split does not say
        if passage is not None:
            candidates.append(passage)
            if is_true(row.get("is_supporting"), "is_supporting", location):
                positives.append(passage)
    answers = as_texts(element.get("answer"), location) + as_texts(element.get("answer_aliases"), location)
    query = get_field(element, "question", str, location)
    collector.add_question(identifier, query, answers, positives if told else None, candidates)


def _add_boolq(collector: QuestionCollector, element: dict[str, Any], location: str, default_id: str) -> None:
    identifier = get_identifier(element, default_id, "id", "_id", "idx")
    text = get_field(element, "passage", str, location)
    passage = collector.add_passage(titled(str(element.get("title") or ""), text) if not is_blank(text) else "")
    answer = element.get("answer", element.get("label"))
    # The test split of SuperGLUE has the label -1.
    answers = [] if answer in (None, -1, "-1", "") else ["yes" if is_true(answer, "answer", location) else "no"]
    if passage is None:
        collector.drop("empty_passage", identifier)
    else:
        collector.add_question(identifier, get_field(element, "question", str, location), answers, [passage], [])


def _add_pubmedqa(collector: QuestionCollector, element: dict[str, Any], location: str, default_id: str) -> None:
    original = "QUESTION" in element
    context = element.get("CONTEXTS") if original else element.get("context")
    context = context.get("contexts") if isinstance(context, dict) else context
    passages = collector.add_passages(as_texts(context, f"{location}, context"))
    # Where nobody decided between yes, no and maybe, the conclusion is the answer.
    answer = element.get("final_decision") or element.get("LONG_ANSWER" if original else "long_answer")
    query = get_field(element, "QUESTION" if original else "question", str, location)
    identifier = get_identifier(element, default_id, "id", "pubid")
    collector.add_question(identifier, query, as_texts(answer, location), passages or None, [])


def _are_texts(value: Any) -> bool:
    """Whether a field holds texts, or a text that may spell a list of them, rather than objects."""
    if isinstance(value, str):
        return not value.lstrip().startswith("{")
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _decoded(value: Any, location: str) -> Any:
    """The list that a column of texts spells, as Parquet may have one."""
    return decode_cell(value, location, mappings=False) if isinstance(value, str) else value


def _is_truth_value(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, str) and value.lower() in ("true", "false"))


def _strings(value: Any, location: str) -> Any:
    """The texts in a text, in spans that hold one as `string`, or in lists of these, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield get_field(value, "string", str, location)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item, location)
    elif value is not None:
        raise SourceError(f"{location}: found the answer {str(value)[:60]}; expected a text. Correct the file.")


_READERS = {
    "squad": _add_squad,
    "hotpotqa": _add_hotpotqa,
    "nq": _add_nq,
    "triviaqa": _add_triviaqa,
    "msmarco": _add_msmarco,
    "popqa": _add_popqa,
    "bioasq": _add_bioasq,
    "musique": _add_musique,
    "boolq": _add_boolq,
    "pubmedqa": _add_pubmedqa,
    "dpr": add_dpr,
    "records": add_record,
}
