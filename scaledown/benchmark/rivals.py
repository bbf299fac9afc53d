"""What else shortens documents, in the run that times ScaleDown: pruners, rerankers, other slots, a cached prefix.

Shapes are those of the published models and weights are random, so that only time and memory are compared. Each rival
is what its model computes, and the generator reading what is left. Splitting into sentences, sorting and joining text
are not counted.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModel, DynamicCache, PreTrainedModel

from errors_scaledown import ScaleDownError
from families_scaledown import num_positions
from shortcuts_scaledown import CACHE_NAME

from .configurations import load_shape
from .speed import TimedModels, Timing, default_dtype, draw_ids
from .workload import Workload

CACHED_PREFIX = "full text, prefix cached"
OWN_DECODER = "generator"
# [CLS] question [SEP] document [SEP], in some tokenizers with one [SEP] more.
FRAME_TOKENS = 4
ROWS_PER_PASS = 64
# RECOMP scores sentences; English ones have about as many tokens.
SENTENCE_LENGTH = 25


@dataclass(frozen=True)
class Rival:
    """A way to give the generator less to read.

    Args:
        name: As the table shows it.
        shape: Shape of the model that reads the documents; `None` where that was done before.
        keeps: Share of the documents' tokens that is left.
        keeps_documents: Documents that are left, whole.
        reads_question: Whether documents are read with the question.
        by_sentence: Whether sentences are read one by one.
        as_slots: Whether slots are left, not text.
    """

    name: str
    shape: str | None
    keeps: float = 1.0
    keeps_documents: int | None = None
    reads_question: bool = True
    by_sentence: bool = False
    as_slots: bool = False

    def tokens_read(self, workload: Workload) -> int:
        """Tokens of the generator's prompt."""
        if self.as_slots:
            return workload.frame_length + workload.slots
        count = min(self.keeps_documents or workload.num_documents, workload.num_documents)
        frame = workload.frame_length - (workload.num_documents - count) * workload.separator_length
        return frame + round(self.keeps * count * workload.document_length)

    def rows_read(self, workload: Workload) -> tuple[int, int]:
        """Rows of a question that the rival's model reads, and tokens of each."""
        if self.by_sentence:  # and the question
            return workload.num_documents * -(-workload.document_length // SENTENCE_LENGTH) + 1, SENTENCE_LENGTH
        length = workload.document_length + FRAME_TOKENS
        if self.as_slots:
            length += workload.slots // workload.num_documents
        return workload.num_documents, length + workload.query_length * self.reads_question


RIVALS = (
    # LLMLingua-2 (arXiv 2403.12968) drops tokens without knowing the question.
    *(
        Rival(f"LLMLingua-2 ({title}) {rate}×", shape, 1 / rate, reads_question=False)
        for title, shape in (("XLM-R large", "xlm-roberta-large"), ("mBERT base", "mbert-base"))
        for rate in (3, 6)
    ),
    # Provence (arXiv 2501.16214) drops sentences, half of the text to four fifths; OpenProvence does with ModernBERT.
    *(
        Rival(f"{title}, keeps {share:.0%}", shape, share)
        for title, shape in (
            ("Provence (DeBERTa-v3 large)", "deberta-v3-large"),
            ("Provence (DeBERTa-v3 base)", "deberta-v3-base"),
            ("OpenProvence (150M)", "modernbert-base"),
            ("OpenProvence (30M)", "modernbert-30m"),
        )
        for share in (0.5, 0.2)
    ),
    Rival("reranker (DeBERTa-v3 large), best 3", "deberta-v3-large", keeps_documents=3),
    # RECOMP's extractive compressor (arXiv 2310.04408) leaves about 6 % of the text.
    Rival("RECOMP, extractive", "bert-base", 0.06, by_sentence=True),
    # PISCO (arXiv 2501.16075) compresses documents alone, by the whole generator: once, or while the user waits.
    Rival("PISCO, compressed before", None, as_slots=True),
    Rival("PISCO, compressed now", OWN_DECODER, reads_question=False, as_slots=True),
)


class RivalModels:
    """Models of rivals, beside those that are timed.

    Args:
        models: The generator and ScaleDown's compressors.

    Raises:
        ValueError: A rival cannot read documents this long.
    """

    def __init__(self, models: TimedModels):
        self.models = models
        self._encoders: dict[str, PreTrainedModel] = {OWN_DECODER: models.generator.base_model}
        dtype = models.generator.dtype
        for rival in RIVALS:
            if rival.shape is None:
                continue
            is_own = rival.shape == OWN_DECODER
            config = models.generator.config if is_own else load_shape(rival.shape)
            limit = num_positions(config)
            longest = max(rival.rows_read(workload)[1] for workload, _ in models.arguments.settings)
            if limit is not None and longest > limit:
                raise ScaleDownError(
                    f"{rival.name} reads {limit} tokens at once, and the longest setting needs {longest}; lower "
                    "document_length or query_length, or leave out rivals."
                )
            if rival.shape not in self._encoders:
                with models.device, default_dtype(dtype):
                    self._encoders[rival.shape] = AutoModel.from_config(config).eval()
                models.parts.append(self._encoders[rival.shape])

    def runs(self, workload: Workload, batch_size: int) -> dict[str, Callable[[], Timing]]:
        """What each rival does with a batch, by its name.

        Args:
            workload: What is read and written.
            batch_size: Questions.

        Returns:
            Functions that answer once.
        """
        found = {CACHED_PREFIX: self._cached_run(workload, batch_size)}
        for rival in RIVALS:
            ids = self._ids(self.models.generator, batch_size, rival.tokens_read(workload))
            encode = self._encoding(rival, workload, batch_size)
            found[rival.name] = self.models.text_run(ids, workload.new_tokens, encode)
        return found

    def tokens_read(self, name: str, workload: Workload) -> int:
        """Tokens that the generator reads after a rival."""
        if name == CACHED_PREFIX:
            return workload.text_length - workload.prompt_length // 2
        return next(rival for rival in RIVALS if rival.name == name).tokens_read(workload)

    def _ids(self, model: PreTrainedModel, *shape: int) -> torch.Tensor:
        source = torch.Generator().manual_seed(self.models.arguments.seed)
        return draw_ids(source, model.config.vocab_size, *shape).to(self.models.device)

    def _encoding(self, rival: Rival, workload: Workload, batch_size: int) -> Callable[[], Any]:
        if rival.shape is None:
            return lambda: None
        encoder = self._encoders[rival.shape]
        rows, length = rival.rows_read(workload)
        ids = self._ids(encoder, batch_size * rows, length)
        options = {"use_cache": False} if rival.shape == OWN_DECODER else {}

        def encode() -> None:
            for part in ids.split(ROWS_PER_PASS):
                encoder(input_ids=part, attention_mask=torch.ones_like(part), **options)

        return encode

    def _cached_run(self, workload: Workload, batch_size: int) -> Callable[[], Timing]:
        """The prompt in front of the documents was read before."""
        generator = self.models.generator
        ids = self._ids(generator, batch_size, workload.text_length)
        cache = DynamicCache(config=generator.config)
        with torch.inference_mode():
            generator(input_ids=ids[:, : workload.prompt_length // 2], use_cache=True, **{CACHE_NAME: cache})

        def run() -> Timing:
            fresh = {CACHE_NAME: copy.deepcopy(cache)}  # which a server shares between requests
            return self.models.text_run(ids, workload.new_tokens, settings=fresh)()

        return run
