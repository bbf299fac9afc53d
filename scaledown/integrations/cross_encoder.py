"""sentence-transformers: a ScaleDown model in the place of a `CrossEncoder`.

reranker = ScaleDownCrossEncoder("runs/mistral")
reranker.rank("Who wrote Ivanhoe?", documents, top_k=3)
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from errors_scaledown import ScaleDownError

from .backend import best_first, check_top_n, open_backend


class ScaleDownCrossEncoder:
    """Scores pairs of question and document, with the methods of `sentence_transformers.CrossEncoder`.

    Args:
        model: A loaded `ScaleDownModel`, or its folder or name on the Hub.
        url: Address of a service, in place of a model.
        revision: Branch, tag or commit of the model.
        api_key: Key of the service.
    """

    def __init__(
        self, model: Any = None, url: str | None = None, revision: str | None = None, api_key: str | None = None
    ):
        self._backend = open_backend(model, url, revision, api_key)

    def predict(
        self,
        pairs: Sequence[tuple[str, str]] | tuple[str, str],
        batch_size: int = 64,
        show_progress_bar: bool | None = None,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
    ) -> np.ndarray | np.float32 | torch.Tensor | list[torch.Tensor]:
        """Score pairs.

        Args:
            pairs: Pairs of question and document, or one pair.
            batch_size: Chunks scored at a time; a service decides that itself.
            show_progress_bar: Whether to show a bar that counts questions.
            convert_to_numpy: Whether to return an array; otherwise a list of tensors.
            convert_to_tensor: Whether to return a tensor, whatever `convert_to_numpy` says.

        Returns:
            Reranking scores `(len(pairs),)`, −inf for a document without text; one number for one pair.

        Raises:
            ScaleDownError: Something is not a pair of texts.
        """
        single = len(pairs) == 2 and all(isinstance(part, str) for part in pairs)
        rows = [pairs] if single else list(pairs)
        for place, pair in enumerate(rows):
            if isinstance(pair, str) or len(pair) != 2:
                raise ScaleDownError(f"pairs[{place}] is {pair!r}, expected a question and a document.")
        scores = np.zeros(len(rows), dtype=np.float32)
        # The documents of a question share a pass.
        places: dict[str, list[int]] = {}
        for place, (question, _) in enumerate(rows):
            places.setdefault(question, []).append(place)
        for question, of_question in tqdm(places.items(), desc="Questions", disable=not show_progress_bar):
            documents = [rows[place][1] for place in of_question]
            scores[of_question] = self._backend.rank(question, documents, batch_size)
        if convert_to_tensor or not convert_to_numpy:
            found = torch.from_numpy(scores)
            return found[0] if single else (found if convert_to_tensor else list(found))
        return scores[0] if single else scores

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: int | None = None,
        return_documents: bool = False,
        batch_size: int = 64,
        show_progress_bar: bool | None = None,
    ) -> list[dict[str, Any]]:
        """Rank documents.

        Args:
            query: The question.
            documents: The documents.
            top_k: Documents to return; all where None.
            return_documents: Whether to return their texts too.
            batch_size: Chunks scored at a time; a service decides that itself.
            show_progress_bar: Taken for the sake of calls that name it; one question needs no bar.

        Returns:
            `{"corpus_id": int, "score": float}` (and `"text"`) of each that has text, best first.
        """
        check_top_n(top_k, "top_k")
        scores = self._backend.rank(query, documents, batch_size)
        results: list[dict[str, Any]] = [
            {"corpus_id": place, "score": scores[place]} for place in best_first(scores, top_k)
        ]
        if return_documents:
            results = [{**result, "text": documents[result["corpus_id"]]} for result in results]
        return results
