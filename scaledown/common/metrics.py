"""Metrics of answers, normalized as SQuAD's official evaluation does (Rajpurkar et al., arXiv 1606.05250)."""

import re
import string
from collections import Counter
from collections.abc import Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")
WORD = re.compile(r"[^\W_]+")
WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower the case and take off punctuation, articles and superfluous white space.

    Args:
        text: An answer.

    Returns:
        Its normal form.
    """
    return " ".join(ARTICLES.sub(" ", text.lower().translate(WITHOUT_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Tell whether a prediction is one of the answers.

    Args:
        prediction: What the model wrote.
        answers: Gold answers.

    Returns:
        1 or 0.
    """
    return float(normalize_answer(prediction) in {normalize_answer(answer) for answer in answers})


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Compare words, each as often as it occurs, with the answer that fits best.

    Args:
        prediction: What the model wrote.
        answers: Gold answers.

    Returns:
        The harmonic mean of precision and recall, from 0 to 1.
    """
    return max(_f1(normalize_answer(prediction).split(), normalize_answer(answer).split()) for answer in answers)


def match(prediction: str, answers: Sequence[str]) -> float:
    """Tell whether an answer is a part of the prediction: the "accuracy" of OSCAR (arXiv 2504.07109).

    Args:
        prediction: What the model wrote.
        answers: Gold answers.

    Returns:
        1 or 0.
    """
    predicted = normalize_answer(prediction)
    # Every text contains the empty one, which an article or punctuation leaves: it matches itself alone.
    return float(any(gold in predicted if gold else not predicted for gold in map(normalize_answer, answers)))


def rouge_l(prediction: str, answers: Sequence[str]) -> float:
    """Compare the longest common subsequence of words with the answer that fits best (Lin, 2004), without stemming.

    Args:
        prediction: What the model wrote.
        answers: Gold answers.

    Returns:
        The harmonic mean of precision and recall, from 0 to 1.
    """
    predicted = WORD.findall(prediction.lower())
    return max(_rouge_l(predicted, WORD.findall(answer.lower())) for answer in answers)


ANSWER_METRICS = {"exact_match": exact_match, "f1": f1, "match": match}


def _f1(predicted: list[str], gold: list[str]) -> float:
    if not predicted or not gold:
        return float(predicted == gold)
    common = (Counter(predicted) & Counter(gold)).total()
    return 2 * common / (len(predicted) + len(gold))


def _rouge_l(predicted: list[str], gold: list[str]) -> float:
    lengths = [0] * (len(gold) + 1)  # of common subsequences of what was read of `predicted` with each start of `gold`
    for word in predicted:
        diagonal = 0
        for i, other in enumerate(gold, start=1):
            longest = diagonal + 1 if word == other else max(lengths[i], lengths[i - 1])
            diagonal, lengths[i] = lengths[i], longest
    return 2 * lengths[-1] / (len(predicted) + len(gold)) if lengths[-1] else 0.0
