"""The reranking teacher: a cross-encoder's score of every document for its question."""

from collections.abc import Sequence
from typing import Any

import torch

from errors_scaledown import ScaleDownError

from ...common.devices import pick_dtype
from ...common.loading import check_head, import_sentence_transformers, load_model

# The DeBERTa-v3 reranker of the paper.


class RerankingTeacher:
    """Scores documents with a sentence-transformers `CrossEncoder`.

    The scores are the model's raw outputs, without the sigmoid that `CrossEncoder` applies by default: the paper's
    loss is the squared error of raw scores, and after a sigmoid most documents would have the same score.

    Args:
        model_name_or_path: A cross-encoder with one output: any sequence classification model.
        revision: Branch, tag or commit of the model.
        dtype: One of `scaledown.common.choices.DTYPES`.
        batch_size: Pairs scored at once; those of one call are sorted by length.
        max_length: Tokens of question and document together; longer pairs are cut.

    Raises:
        ImportError: sentence-transformers is missing.
        ValueError: The model cannot be loaded, or has more than one output.
    """

    def __init__(
        self,
        model_name_or_path: str,
        revision: str | None = None,
        dtype: str = "auto",
        batch_size: int = 64,
        max_length: int = 512,
    ):
        self.batch_size = batch_size
        sentence_transformers = import_sentence_transformers()
        self._model = load_model(
            lambda: sentence_transformers.CrossEncoder(
                model_name_or_path,
                revision=revision,
                model_kwargs={"dtype": pick_dtype(dtype)},
                activation_fn=torch.nn.Identity(),
            ),
            model_name_or_path,
            "--reranker",
        )
        check_head(self._model, model_name_or_path, "--reranker", revision)
        if self._model.num_labels != 1:
            raise ScaleDownError(
                f"--reranker names {model_name_or_path}, which has {self._model.num_labels} outputs; expected one, the "
                f"relevance. Choose another cross-encoder."
            )
        positions = getattr(self._model.config, "max_position_embeddings", None) or max_length
        # Some tokenizers state no limit of their own.
        self._model.max_seq_length = min(max_length, positions, self._model.max_seq_length or max_length)

    def score(self, records: Sequence[dict[str, Any]]) -> list[list[float]]:
        """Score the documents of records.

        Args:
            records: Records with `query` and `documents`.

        Returns:
            For each record one score per document; higher is more relevant.

        Raises:
            ValueError: The model gives a score that is no number.
        """
        pairs = [(record["query"], document) for record in records for document in record["documents"]]
        if not pairs:
            return [[] for _ in records]
        scores = self._model.predict(pairs, batch_size=self.batch_size, show_progress_bar=False, convert_to_tensor=True)
        scores = scores.float().cpu()
        if not bool(torch.isfinite(scores).all()):
            place = int((~torch.isfinite(scores)).nonzero()[0])
            raise ScaleDownError(
                f"the reranker gave the score {scores[place].item()} to the pair {str(pairs[place])[:200]}; expected a "
                f"finite number. Try --dtype float32."
            )
        values = iter(scores.tolist())
        return [[next(values) for _ in record["documents"]] for record in records]
