"""The formats of question-answering data sets: each reads one element of its source into a collector.

| format     | what is read                                                                                          |
| ---------- | ----------------------------------------------------------------------------------------------------- |
| `squad`    | the original JSON (`data` / `paragraphs` / `qas`), a flat `[{context, qas}]`, rows of `datasets`       |
| `hotpotqa` | the original JSON (`context` as pairs) and rows of `datasets` (`context` as columns), array or lines   |
| `nq`       | Natural Questions with one paragraph each, as in QED: its original file, or `{question, paragraph, …}` |
| `triviaqa` | rows of `datasets` (`rc`, `rc.nocontext`, `unfiltered`), the original JSON (questions only)            |
| `msmarco`  | rows of `datasets` (`v1.1`, `v2.1`), the original JSON                                                 |
| `popqa`    | rows of `datasets`, the original TSV: questions only                                                   |
| `bioasq`   | the original JSON with snippets, or lines of the same fields                                           |
| `columns`  | any rows with columns for question, answer, documents and id                                           |
| `records`  | the project's own                                                                                      |
"""

import ast
import io
import itertools
import json
import tokenize
from dataclasses import dataclass
from typing import Any

from .questions import QuestionCollector, SourceError, as_mapping, as_rows, as_texts, get_field, get_identifier
from .records import is_blank, normalize_record

FORMATS = ("squad", "hotpotqa", "nq", "triviaqa", "msmarco", "popqa", "bioasq", "columns", "records")
# Here the source itself says which documents belong to a question, so they are kept unless others are asked for.
OWN_DOCUMENTS = ("columns", "records")
NO_ANSWER = "No Answer Present."
# The usual names of the columns of any table.
QUESTION_COLUMNS = ("question", "query")
ANSWER_COLUMNS = ("answer", "answers")
DOCUMENTS_COLUMNS = ("documents", "passages", "contexts")
ID_COLUMNS = ("id", "_id")


@dataclass(frozen=True)
class Columns:
    """Names of the columns of the format `columns`; None stands for the usual names, where they are there."""

    question: str | None = None
    answer: str | None = None
    documents: str | None = None
    id: str | None = None

    @property
    def named(self) -> bool:
        """Whether any name is given."""
        return any((self.question, self.answer, self.documents, self.id))


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
    # In a table of one's own, which may have the same names, a text spells the list.
    if {"query", "documents"} <= keys and not isinstance(element["documents"], str):
        return "records"
    if "paragraphs" in keys or {"context", "qas"} <= keys:
        return "squad"
    if {"question", "context"} <= keys:
        # SQuAD's context is one text, HotpotQA's are ten paragraphs of sentences.
        return "squad" if isinstance(element["context"], str) else "hotpotqa"
    if {"question", "paragraph"} <= keys or {"question_text", "paragraph_text"} <= keys:
        return "nq"
    if {"Question", "Answer"} <= keys or ("question" in keys and isinstance(element.get("answer"), dict)):
        return "triviaqa"
    if {"query", "passages"} <= keys and not _are_texts(element["passages"]):
        return "msmarco"
    if {"question", "possible_answers"} <= keys:
        return "popqa"
    if "body" in keys and not {"exact_answer", "ideal_answer", "snippets"}.isdisjoint(keys):
        return "bioasq"
    if not {"question", "query"}.isdisjoint(keys) and not {*ANSWER_COLUMNS, *DOCUMENTS_COLUMNS}.isdisjoint(keys):
        return "columns"
    raise SourceError(
        f"{location}: found the keys {', '.join(map(str, element)) or '(none)'}; expected those of SQuAD (paragraphs, "
        f"or context and qas, or question, context and answers), HotpotQA (question, context, supporting_facts), "
        f"Natural Questions (question, paragraph, answers), TriviaQA (question, answer with a value), MS MARCO (query, "
        f"passages, answers), PopQA (question, possible_answers), BioASQ (body, exact_answer, snippets) or the "
        f"project's records (query, documents, answer). Name the columns with --question_column and --answer_column, "
        f"or convert the file to records."
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
    element = as_mapping(element, location)
    collector.location = location
    if collector.source.format == "columns":
        _add_columns(collector, element, location, default_id, columns or Columns())
    else:
        _READERS[collector.source.format](collector, element, location, default_id)


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
        if "id" in qa:
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
    if qa.get("is_impossible"):
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
    title = element.get("title_text" if original else "title") or ""
    answers = element.get("original_nq_answers" if original else "answers", element.get("answer"))
    # The original lists one list of spans per annotator.
    answers = list(_strings(answers, location))
    passage = collector.add_passage(_titled(title, text) if not is_blank(text) else "")
    if passage is None:
        collector.drop("empty_passage", identifier)
    else:
        collector.add_question(identifier, query, answers, [passage], [])


def _add_triviaqa(collector: QuestionCollector, element: dict[str, Any], location: str, default_id: str) -> None:
    if "Question" in element:  # the original file names the evidence's files, but does not hold it
        answer = get_field(element, "Answer", dict, location)
        answers = [answer.get("Value"), *(answer.get("Aliases") or [])]
        query, identifier = (
            get_field(element, "Question", str, location),
            get_identifier(element, default_id, "QuestionId"),
        )
    else:
        answer = get_field(element, "answer", dict, location)
        answers = [answer.get("value"), *(answer.get("aliases") or [])]
        query = get_field(element, "question", str, location)
        identifier = get_identifier(element, default_id, "question_id", "id")
    # The hidden answers of the test split are spelt so.
    answers = [text for text in answers if isinstance(text, str) and text != "<unk>"]
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
    positives = [passage for passage, row in passages if passage is not None and row.get("is_selected")]
    collector.add_question(
        get_identifier(element, default_id, "query_id", "id"),
        get_field(element, "query", str, location),
        answers,
        # No passage was selected where the annotator found no answer, which tells nothing about the others.
        positives or None,
        [passage for passage, _ in passages if passage is not None],
    )


def _add_popqa(collector: QuestionCollector, element: dict[str, Any], location: str, default_id: str) -> None:
    answers = as_texts(_decoded(element.get("possible_answers"), location), location)
    query = get_field(element, "question", str, location)
    collector.add_question(get_identifier(element, default_id), query, answers, None, [])


def _add_bioasq(collector: QuestionCollector, element: dict[str, Any], location: str, default_id: str) -> None:
    snippets = element.get("snippets") or []
    if isinstance(snippets, dict):
        snippets = as_rows(snippets, f"{location}, snippets")
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


def _add_columns(
    collector: QuestionCollector, element: dict[str, Any], location: str, default_id: str, columns: Columns
) -> None:
    question = _column(element, columns.question, QUESTION_COLUMNS, "question", location)
    answer = _column(element, columns.answer, ANSWER_COLUMNS, "answer", location)
    documents = _column(element, columns.documents, DOCUMENTS_COLUMNS, "documents", location)
    identifier = _column(element, columns.id, ID_COLUMNS, "id", location)
    if question is None:
        raise SourceError(
            f"{location}: found the keys {', '.join(map(str, element)) or '(none)'}; expected a column with the "
            f"question. Name it with --question_column."
        )
    answers = _listed_texts(answer, f"{location}, answer")
    texts = _listed_texts(documents, f"{location}, documents")
    record = {"query": str(question), "documents": texts, "answer": answers}
    identifier = default_id if identifier in (None, "") else str(identifier)
    if is_blank(str(question)):
        collector.drop("empty_question", identifier)
    else:
        _add_record(collector, {**record, "id": identifier}, location, default_id)


def read_record(element: dict[str, Any], location: str, default_id: str) -> dict[str, Any]:
    """Validate a record of a source.

    Args:
        element: The record.
        location: Where it comes from, for messages.
        default_id: The id of a record that has none.

    Returns:
        The record as `records.normalize_record` returns it; an empty answer is no answer.

    Raises:
        RecordError: The record breaks the project's format.
    """
    answer = element.get("answer")
    if isinstance(answer, str) or (isinstance(answer, list) and all(isinstance(text, str) for text in answer)):
        # The question is dropped and counted, not refused with its whole file.
        element = {**element, "answer": [text for text in as_texts(answer, location) if not is_blank(text)]}
    return normalize_record(element, location, default_id, require_answer=False)


def _add_record(collector: QuestionCollector, element: dict[str, Any], location: str, default_id: str) -> None:
    record = read_record(element, location, default_id)
    others = collector.source.other_fields
    others += [name for name, value in element.items() if value is not None and name not in (*record, *others)]
    # The format has no empty documents, so the pool holds every one of them.
    documents = [collector.add_passage(document) for document in record["documents"]]
    positives = record["positives"]
    if positives is not None:
        positives = [documents[index] for index in positives]
    if record["reranking_scores"] is not None:
        collector.source.num_scores_discarded += 1
    collector.add_question(record["id"], record["query"], record["answer"], positives, documents, record)


def _column(element: dict[str, Any], name: str | None, usual: tuple[str, ...], meaning: str, location: str) -> Any:
    if name is None:
        return next((element[name] for name in usual if element.get(name) is not None), None)
    if name not in element:
        raise SourceError(
            f"{location}: found the columns {', '.join(map(str, element)) or '(none)'}; expected {name!r}, the "
            f"{meaning}. Correct --{meaning}_column."
        )
    return element[name]


def _are_texts(value: Any) -> bool:
    """Whether a field holds texts, or a text that may spell a list of them, rather than objects."""
    if isinstance(value, str):
        return not value.lstrip().startswith("{")
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _listed_texts(value: Any, location: str) -> list[str]:
    return [text for text in as_texts(_decoded(value, location), location) if not is_blank(text)]


def _decoded(value: Any, location: str) -> Any:
    """The list that a table's cell spells, as JSON or as Python prints it; any other value as it is."""
    text = value.strip() if isinstance(value, str) else ""
    if not (text.startswith("[") and text.endswith("]")):
        return value
    try:
        decoded = json.loads(text)
    except (ValueError, RecursionError):
        decoded = _python_list(text, location)
    # A list of lists is more likely an answer, such as a matrix, than a list of texts.
    return value if decoded is None or any(isinstance(item, list) for item in decoded) else decoded


def _python_list(text: str, location: str) -> list[Any] | None:
    """The list a text spells in Python, which is how pandas writes one into a CSV; None where it is ordinary text."""
    try:
        decoded = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    if not isinstance(decoded, list):
        return None
    kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type != tokenize.NL]
    if (tokenize.STRING, tokenize.STRING) in itertools.pairwise(kinds):
        # To Python, texts with no comma between are one text.
        raise SourceError(
            f"{location}: found {' '.join(text.split())[:60]}, an array as numpy prints it, without commas; expected a "
            f"list. Write lists as JSON, with json.dumps for example."
        )
    return decoded


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


def _titled(title: str, text: str) -> str:
    # The title names the entity, which the text itself often calls only "he" or "the film".
    return f"{title.strip()}: {text}" if title.strip() else text


_READERS = {
    "squad": _add_squad,
    "hotpotqa": _add_hotpotqa,
    "nq": _add_nq,
    "triviaqa": _add_triviaqa,
    "msmarco": _add_msmarco,
    "popqa": _add_popqa,
    "bioasq": _add_bioasq,
    "records": _add_record,
}
