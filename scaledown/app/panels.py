"""HTML of answers, figures and bars. Everything that comes from a person or a model is escaped here."""

from collections.abc import Sequence
from html import escape

from .answers import Passage, Reading

EXCERPT = 120  # characters of a passage beside its bar

# Colours are made of Gradio's own variables, which change with light and dark.
CSS = """
.gradio-container { max-width: 1100px !important; margin: 0 auto; }
#example input { text-overflow: ellipsis; margin-right: 16px; }
.gradio-container .html-container { padding: 0; }
.sd { --sd-quiet: color-mix(in srgb, var(--body-text-color) 72%, transparent); --sd-read: #0d9488;
  color: var(--body-text-color); overflow-wrap: anywhere; line-height: 1.45; }
.sd-card { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 14px 16px; }
.sd h3 { margin: 0 0 2px; font-size: 1rem; font-weight: 600; color: inherit; }
.sd p { margin: 0; }
.sd .sd-how, .sd dt, .sd small, .sd .sd-excerpt, .sd .sd-empty { color: var(--sd-quiet); }
.sd .sd-how { font-size: .85rem; }
.sd .sd-answer { min-height: 2rem; margin: 10px 0; font-size: 1.35rem; white-space: pre-wrap; }
.sd .sd-notice { padding: 6px 10px; font-size: .95rem; border-left: 4px solid var(--sd-read);
  background: color-mix(in srgb, var(--body-text-color) 6%, transparent); }
.sd .sd-error { border-left-color: #dc2626; margin: 10px 0; }
.sd .sd-figures { display: grid; grid-template-columns: repeat(4, auto); gap: 8px; margin: 0; }
.sd .sd-figures dt, .sd small { font-size: .75rem; overflow-wrap: normal; }
.sd .sd-figures dd { margin: 0; font-size: 1.05rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
.sd .sd-figures small { display: block; }
.sd .sd-ranking { list-style: none; margin: 10px 0 0; padding: 0; }
.sd .sd-ranking li { display: grid; grid-template-columns: 5.6rem 1fr 3.2rem 7.5rem; gap: 2px 10px; align-items: center;
  padding: 7px 0; margin: 0; border-top: 1px solid var(--border-color-primary); font-size: .9rem; color: inherit; }
.sd .sd-bar { position: relative; height: 12px; border-radius: 3px;
  background: color-mix(in srgb, var(--body-text-color) 9%, transparent); }
.sd .sd-bar i { position: absolute; left: 0; height: 100%; min-width: 3px; border-radius: 3px;
  background: var(--sd-read); }
.sd .sd-bar b { position: absolute; left: 50%; top: -2px; width: 1px; height: 16px; background: var(--sd-quiet); }
.sd .sd-out .sd-bar i { background: #94a3b8; }
.sd .sd-score { text-align: right; font-variant-numeric: tabular-nums; }
.sd .sd-state::before { content: "●"; margin-right: 6px; color: var(--sd-read); }
.sd .sd-out .sd-state::before { content: "○"; color: var(--sd-quiet); }
.sd .sd-excerpt { grid-column: 1 / -1; font-size: .82rem; }
@media (max-width: 1150px) { .sd .sd-figures { grid-template-columns: repeat(2, 1fr); } }
@media (max-width: 600px) {
  .sd .sd-ranking li { grid-template-columns: 5.2rem 1fr 2.8rem; }
  .sd .sd-state { grid-column: 1 / -1; }
}
"""


def notice(text: str, is_error: bool = False) -> str:
    """One line about a request.

    Args:
        text: What to say; nothing is shown where it is empty.
        is_error: Whether something must be mended.

    Returns:
        HTML.
    """
    if not text:
        return ""
    role, kind = ("alert", "sd-notice sd-error") if is_error else ("status", "sd-notice")
    return f'<div class="sd"><p role="{role}" class="{kind}">{escape(text)}</p></div>'


def answer_panel(title: str, how: str, reading: Reading) -> str:
    """An answer with what it took.

    Args:
        title: What was read.
        how: One line about who reads it.
        reading: The answer as far as it is written.

    Returns:
        HTML.
    """
    if reading.error is not None:
        body = f'<p role="alert" class="sd-notice sd-error">{escape(reading.error)}</p>'
    elif reading.answer:
        body = f'<p class="sd-answer">{escape(reading.answer)}</p>'
    else:
        waiting = "(an empty answer)" if reading.whole is not None else "…"
        body = f'<p class="sd-answer sd-empty">{waiting}</p>'
    tokens = "–"
    if reading.tokens is not None:
        kind = "all text" if reading.slots is None else f"{reading.slots:,} of them slots"
        tokens = f"{reading.tokens:,}<small>{kind}</small>"
    figures = [
        ("tokens read", tokens),
        ("compression", _milliseconds(reading.compression)),
        ("first token", _milliseconds(reading.first_token)),
        ("whole answer", _milliseconds(reading.whole)),
    ]
    cells = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in figures)
    return (
        f'<div class="sd sd-card" aria-live="polite"><h3>{escape(title)}</h3><p class="sd-how">{escape(how)}</p>'
        f'{body}<dl class="sd-figures">{cells}</dl></div>'
    )


def ranking_panel(passages: Sequence[Passage]) -> str:
    """Bars for the passages' scores, best first, and which were read.

    Args:
        passages: The passages; nothing is shown without any.

    Returns:
        HTML.
    """
    if not passages:
        return ""
    ranked = sorted(passages, key=lambda passage: 0.0 if passage.score is None else -passage.score)
    scores = [passage.score for passage in ranked if passage.score is not None]
    scale = max((abs(score) for score in scores), default=0.0) or 1.0
    rows = "".join(_row(passage, scale) for passage in ranked)
    how = (
        "By the reranking score, which the compressor computes in the same pass. A longer bar is a more relevant "
        "passage; the mark in the middle is a score of 0."
        if scores
        else "This model was built without reranking: passages have no scores, and all are read."
    )
    return (
        f'<div class="sd sd-card"><h3>Passages, best first</h3><p class="sd-how">{how}</p>'
        f'<ol class="sd-ranking">{rows}</ol></div>'
    )


def _row(passage: Passage, scale: float) -> str:
    """A passage with a bar from -scale at the left end to its score."""
    bar, score = "", "–"
    if passage.score is not None:
        bar = f'<i style="width:{50 + 50 * passage.score / scale:.1f}%"></i><b></b>'
        score = f"{passage.score:.2f}".replace("-", "−")
    state = f"read, {passage.slots} slots" if passage.read else "left out"
    excerpt = passage.text if len(passage.text) <= EXCERPT else passage.text[:EXCERPT].rsplit(" ", 1)[0] + " …"
    return (
        f'<li class="{"sd-in" if passage.read else "sd-out"}"><span>Passage {passage.number}</span>'
        f'<span class="sd-bar" aria-hidden="true">{bar}</span><span class="sd-score">{score}</span>'
        f'<span class="sd-state">{state}</span><p class="sd-excerpt">{escape(excerpt)}</p></li>'
    )


def _milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{1000 * seconds:,.0f} ms"
