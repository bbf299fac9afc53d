"""Training and test data of models/smollm2-135m-16x: real questions with BM25 distractors, and blanks in real text.

    python experiments/smollm2_data.py --data ../shared/data --output runs/smollm2/data

Writes `questions.jsonl.xz` (questions of several published sets, 5 passages each), `single.jsonl.xz` (the same, each
with its own passage alone), `pairs.jsonl.xz` (each with that and one other, none of more than 240 tokens),
`mixed.jsonl.xz` (the same with 1 to 5), `blanks.jsonl.xz` (a sentence of an article with a name or a number left out,
and 1 to 3 paragraphs of that article), `text.txt.xz` (paragraphs, for auto-encoding and continuation) and
`report.json`. Texts that share two runs of 8 words with a passage of the test sets (SQuAD part 1, HotpotQA dev) are
left out and counted.
Questions about a single passage get their other passages from the same file, by BM25.
"""

import argparse
import json
import logging
import lzma
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from passage_cuts import shortened, without_long_distractors
from tqdm import tqdm

from scaledown.data.choice import PoolDocuments, stable_hash
from scaledown.data.questions import Question
from scaledown.data.records import write_records

logger = logging.getLogger(__name__)

SHINGLE = 8
MOST_SHARED = 1
# Questions taken of each set, and of each of its passages; answers of at most so many words are learned.
SOURCES = {
    "squad": (8000, 20),
    "squadshifts-newwiki": (8000, 20),
    "nq": (8000, 20),
    "qamr": (8000, 16),
    "fairytaleqa": (6000, 4),
    "ropes": (3000, 2),
    "wikitablequestions": (3000, 3),
    "boolq": (2000, 1),
    "hotpotqa": (300, 5),
}
MOST_ANSWER_WORDS = 8
NUM_DOCUMENTS = 5
LONGEST = 240  # tokens of a passage in pairs
# Teacher scores where the positives are known and no cross-encoder was asked.
RELEVANT, IRRELEVANT = 3.0, -3.0
WORDS = re.compile(r"\w+")
SENTENCES = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'])")
# A name of one to four capitalised words, a number with its unit sign, or a date; not the sentence's first word.
ANSWERS = re.compile(
    r"(?<=\w )(?:\d{1,2} (?:January|February|March|April|May|June|July|August|September|October|November|December)"
    r"(?: \d{4})?|[$£€]?\d[\d,.]*\d%?|\d+|[A-Z][\w’'-]+(?: (?:of |the )?[A-Z][\w’'-]+){0,3})(?=[ ,.;:)])"
)


def shingles(text: str) -> set[int]:
    """Runs of 8 words of a text, lower case, as hashes."""
    words = WORDS.findall(text.lower())
    return {hash(tuple(words[i : i + SHINGLE])) for i in range(len(words) - SHINGLE + 1)}


def read_lines(path: Path) -> Iterator[str]:
    """Lines of a text file, plain or packed."""
    with lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8") as stream:
        yield from stream


def test_passages(data: Path) -> Iterator[str]:
    """Every passage of the test sets."""
    squad = json.loads((data / "squad/squad-v1.1-part1.json").read_text(encoding="utf-8"))
    articles = squad["data"] if isinstance(squad, dict) else squad
    for article in articles:
        yield from (paragraph["context"] for paragraph in article["paragraphs"])
    for line in read_lines(data / "hotpotqa/dev.jsonl"):
        yield from ("".join(sentences) for sentences in json.loads(line)["context"]["sentences"])


def read_questions(data: Path, name: str) -> Iterator[tuple[str, str, list[str], list[str], list[str]]]:
    """Id, question, answers, gold passages and own other passages of each question of a set."""
    if name == "squad":
        for i, paragraph in enumerate(json.loads((data / "squad/squad-train-subset.json").read_text("utf-8"))):
            for j, qa in enumerate(paragraph["qas"]):
                answers = qa["answer"] if isinstance(qa["answer"], list) else [qa["answer"]]
                yield f"squad-{i}-{j}", qa["question"], answers, [paragraph["context"]], []
    elif name == "nq":
        for line in read_lines(data / "nq/qed-train.jsonl"):
            row = json.loads(line)
            yield f"nq-{row['id']}", row["question"], row["answers"], [row["paragraph"]], []
    elif name == "hotpotqa":
        for line in read_lines(data / "hotpotqa/train.jsonl"):
            row = json.loads(line)
            gold = set(row["supporting_facts"]["title"])
            named = list(zip(row["context"]["title"], map("".join, row["context"]["sentences"]), strict=True))
            positives = [f"{title}: {text}" for title, text in named if title in gold]
            others = [f"{title}: {text}" for title, text in named if title not in gold]
            yield f"hotpot-{row['id']}", row["question"], [row["answer"]], positives, others
    else:
        for line in read_lines(data / f"qa/{name}.jsonl.xz"):
            row = json.loads(line)
            yield f"{name}-{row['id']}", row["question"], row["answers"], [row["passage"]], []


def questions_of(data: Path, name: str, seen: set[int], seed: int, report: Counter) -> list[Question]:
    """The questions of a set that training uses."""
    most, per_passage = SOURCES[name]
    by_passage = Counter()
    found = []
    rows = list(read_questions(data, name))
    random.Random(f"{seed} {name}").shuffle(rows)
    for identifier, query, answers, positives, others in rows:
        report[f"{name}: read"] += 1
        answers = [answer for answer in answers if answer.strip() and len(answer.split()) <= MOST_ANSWER_WORDS]
        if not answers or not query.strip() or any(not passage.strip() for passage in positives):
            report[f"{name}: no short answer"] += 1
        elif any(len(shingles(passage) & seen) > MOST_SHARED for passage in positives):
            report[f"{name}: near a test passage"] += 1
        elif by_passage[positives[0]] >= per_passage or len(found) >= most:
            report[f"{name}: enough of its passage or set"] += 1
        else:
            by_passage[positives[0]] += 1
            found.append(Question(identifier, query.strip(), answers, positives, positives + others))
    report[f"{name}: used"] = len(found)
    return found


def scored(record: dict) -> dict:
    """A record with scores that say which of its passages are the gold ones."""
    gold = set(record["positives"])
    scores = [RELEVANT if i in gold else IRRELEVANT for i in range(len(record["documents"]))]
    return {**record, "reranking_scores": scores}


def articles_of(path: Path, seen: set[int], report: Counter) -> Iterator[list[str]]:
    """Paragraphs of each article of a file, without those near a test passage."""
    article: list[str] = []
    for line in read_lines(path):
        line = line.strip()
        if line.startswith("= ") and line.endswith(" ="):
            yield article
            article = []
        elif len(line) > 200:
            report["paragraphs: read"] += 1
            if len(shingles(line) & seen) > MOST_SHARED:
                report["paragraphs: near a test passage"] += 1
            else:
                article.append(line)
    yield article


def blanks_of(article: list[str], number: int, generator: random.Random, per_paragraph: int) -> Iterator[dict]:
    """Records that ask for the words left out of a sentence of an article, with some of its paragraphs."""
    paragraphs = [text for text in article if 60 <= len(text.split()) <= 220]
    for i, paragraph in enumerate(paragraphs):
        sentences = [s for s in SENTENCES.split(paragraph) if 8 <= len(s.split()) <= 40]
        generator.shuffle(sentences)
        for j, sentence in enumerate(sentences[:per_paragraph]):
            found = list(ANSWERS.finditer(sentence))
            if not found:
                continue
            answer = generator.choice(found)
            left_out = f"{sentence[: answer.start()]}____{sentence[answer.end() :]}"
            others = [text for text in paragraphs if text is not paragraph and answer.group() not in text]
            generator.shuffle(others)
            documents = [paragraph, *others[: generator.randrange(3)]]
            generator.shuffle(documents)
            yield scored(
                {
                    "id": f"blank-{number}-{i}-{j}",
                    "query": f"What is missing? {left_out}",
                    "documents": documents,
                    "answer": [answer.group()],
                    "positives": [documents.index(paragraph)],
                }
            )


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder that holds squad/, nq/, qa/, text/")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--num_blanks", type=int, default=60_000)
    parser.add_argument("--text_megabytes", type=float, default=40)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments.output.mkdir(parents=True, exist_ok=True)
    seen = set().union(*map(shingles, test_passages(arguments.data)))
    report: Counter = Counter()

    questions, records = defaultdict(list), []
    for name in SOURCES:
        questions[name] = questions_of(arguments.data, name, seen, arguments.seed, report)
    for name, asked in questions.items():
        passages = list(dict.fromkeys(p for q in asked for p in q.candidates))
        choose = PoolDocuments(passages, NUM_DOCUMENTS, "bm25", arguments.seed)
        records += [scored(choose([question])[0]["record"]) for question in tqdm(asked, desc=name)]
    random.Random(arguments.seed).shuffle(records)
    save(arguments.output / "questions.jsonl.xz", records)
    save(arguments.output / "single.jsonl.xz", map(alone, records))
    fitting = [r for r in (without_long_distractors(record, LONGEST) for record in records) if r is not None]
    generator = random.Random(arguments.seed)
    save(arguments.output / "pairs.jsonl.xz", (shortened(record, 2, generator) for record in fitting))
    counts = random.Random(stable_hash(arguments.seed, "passages", "mixed"))
    mixed = (shortened(record, counts.randint(1, NUM_DOCUMENTS), generator) for record in fitting)
    save(arguments.output / "mixed.jsonl.xz", mixed)

    blanks, text, size = [], [], 0.0
    files = sorted((arguments.data / "text").glob("wikipedia*.txt.xz"))
    generator = random.Random(stable_hash(arguments.seed, "blanks", "wikipedia"))
    number = 0
    for file in files:
        for article in tqdm(articles_of(file, seen, report), desc=file.name):
            number += 1
            blanks += blanks_of(article, number, generator, per_paragraph=2)
            if size < arguments.text_megabytes * 1e6:
                text += article
                size += sum(map(len, article))
    generator.shuffle(blanks)
    report["blanks: found"], report["blanks: used"] = len(blanks), min(len(blanks), arguments.num_blanks)
    save(arguments.output / "blanks.jsonl.xz", blanks[: arguments.num_blanks])
    with lzma.open(arguments.output / "text.txt.xz", "wt", encoding="utf-8") as stream:
        stream.writelines(f"{line}\n" for line in text)
    (arguments.output / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for name, count in report.items():
        logger.info("%-45s %8d", name, count)


def alone(record: dict) -> dict:
    """A record with its gold passages alone."""
    gold = record["positives"]
    kept = {name: [record[name][i] for i in gold] for name in ("documents", "reranking_scores")}
    return {**record, **kept, "positives": list(range(len(gold)))}


def save(path: Path, records: Iterable[dict]) -> None:
    """Write records, replacing those of an earlier run."""
    logger.info("%s: %d records", path, write_records(path, records, overwrite=True))


if __name__ == "__main__":
    main()
