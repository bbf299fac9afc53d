# Copyright 2026 The ScaleDown authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Plain text in and out: answers, rankings and compressions, and the names of published OSCAR and PISCO models."""

import torch
from torch import nn
from transformers import PreTrainedModel

try:
    from .compression_scaledown import check_batch_size, compress_chunks
    from .configuration_scaledown import IS_REMOTE_CODE
    from .errors_scaledown import ScaleDownError
    from .filling_scaledown import PromptSettings, check_context, embed_prompts, fill_prompts, require_reranking
    from .generation_scaledown import answer_lengths, with_length
    from .outputs_scaledown import CompressedDocuments
    from .processing_scaledown import ScaleDownProcessor, check_source
    from .reranking_scaledown import check_limits, document_scores
    from .text_scaledown import is_conversation, listed
except ImportError:
    if __package__:  # loaded as remote code: the failure is real
        raise
    from compression_scaledown import check_batch_size, compress_chunks
    from configuration_scaledown import IS_REMOTE_CODE
    from errors_scaledown import ScaleDownError
    from filling_scaledown import PromptSettings, check_context, embed_prompts, fill_prompts, require_reranking
    from generation_scaledown import answer_lengths, with_length
    from outputs_scaledown import CompressedDocuments
    from processing_scaledown import ScaleDownProcessor, check_source
    from reranking_scaledown import check_limits, document_scores
    from text_scaledown import is_conversation, listed


class AnswerOutput(tuple):
    """
    Answers and what they were made of; as a tuple it is the pair of answers and reranking scores.

    Args:
        answers (`str` or `list[str]`): Answer to the one question, or one per question.
        reranking_scores (`list[float]` or `list[list[float]]`): Of the question's documents, read or not.
        documents_read (`list[int]` or `list[list[int]]`):
            Which of the question's documents the generator read, by their place; empty where none was left.
        prompt_tokens (`int` or `list[int]`): Positions the generator read, slots included.
        answer_tokens (`int` or `list[int]`): Tokens it wrote, without an end token.
    """

    def __new__(cls, answers, reranking_scores, documents_read, prompt_tokens, answer_tokens):
        output = super().__new__(cls, (answers, reranking_scores))
        output.answers, output.reranking_scores = answers, reranking_scores
        output.documents_read = documents_read
        output.prompt_tokens, output.answer_tokens = prompt_tokens, answer_tokens
        return output

    def __getnewargs__(self) -> tuple:
        return (*self, self.documents_read, self.prompt_tokens, self.answer_tokens)

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({fields})"


class AnsweringMixin:
    """Plain text in and out: the methods of `ScaleDownModel` that take questions and documents as they are."""

    @property
    def processor(self) -> ScaleDownProcessor:
        """
        The processor saved beside the weights, loaded at its first use, or the one that was assigned.

        Raises:
            ValueError: there is none, it lay in a folder that is gone, or one is assigned that allows more slots than
                the model has memory embeddings.
        """
        if self._processor is None:
            if not self.name_or_path:
                raise ScaleDownError(
                    "This model has no processor: it was built from a configuration. Assign one: model.processor = "
                    "ScaleDownProcessor.from_config(model.config, tokenizer)."
                )
            check_source(self.name_or_path)
            # Whoever let this very file run has trusted the repository; otherwise its tokenizer runs no code either.
            processor = ScaleDownProcessor.from_pretrained(
                self.name_or_path, trust_remote_code=IS_REMOTE_CODE, **self._hub_arguments
            )
            for name, value in self._processor_overrides.items():
                setattr(processor, name, value)
            self.processor = processor
        return self._processor

    @processor.setter
    def processor(self, processor: ScaleDownProcessor):
        if processor is not None and processor.num_memory_tokens > self.config.num_memory_tokens:
            raise ScaleDownError(
                f"The processor allows {processor.num_memory_tokens} slots per chunk, the model has "
                f"{self.config.num_memory_tokens} memory embeddings. Build it with ScaleDownProcessor.from_config."
            )
        if processor is not None:
            processor.check()
            self.config.prompt_date = processor.prompt_date or self.config.prompt_date
        self._processor = processor

    @torch.no_grad()
    def compress(
        self,
        questions: str | list[str],
        documents: list[str] | list[list[str]],
        compression_rate: int | None = None,
        num_memory_tokens: int | None = None,
        batch_size: int = 64,
    ) -> CompressedDocuments:
        """
        Compresses documents, each with its question in view.

        Args:
            questions (`str` or `list[str]`): One question, or one per list of documents.
            documents (`list[str]` or `list[list[str]]`): The documents.
            compression_rate, num_memory_tokens (`int`, *optional*): Overrides for this call.
            batch_size (`int`, defaults to 64): Chunks compressed at a time.

        Returns:
            `CompressedDocuments`: Chunks in the order of the documents.

        Raises:
            ValueError, TypeError: see `ScaleDownProcessor`; no documents at all.
        """
        questions, documents = self.processor.check_texts(questions, documents)
        return _compress_texts(self, questions, documents, compression_rate, num_memory_tokens, batch_size)

    @torch.no_grad()
    def answer(
        self,
        questions: str | list[str],
        documents: list[str] | list[list[str]] | None = None,
        compression_rate: int | None = None,
        num_memory_tokens: int | None = None,
        return_reranking_scores: bool = False,
        batch_size: int = 16,
        min_reranking_score: float | None = None,
        max_documents: int | None = None,
        max_slots: int | None = None,
        system_prompt: str | None = None,
        **generation_kwargs,
    ) -> str | list[str] | AnswerOutput:
        """
        Answers questions from compressed documents.

        Args:
            questions (`str` or `list[str]`):
                One question, or several. A question may be a list of messages of `role` and `content`: the last is the
                question, earlier ones are shown to the generator, and a system message stands in place of the model's.
            documents (`list[str]` or `list[list[str]]`, *optional*):
                Its documents, or one list per question; none asks the generator alone.
            compression_rate, num_memory_tokens (`int`, *optional*): Overrides for this call.
            return_reranking_scores (`bool`, defaults to `False`):
                Also return the documents' relevance, from the same pass, which documents were read, and tokens.
            batch_size (`int`, defaults to 16): Questions answered at a time.
            min_reranking_score (`float`, *optional*):
                Leave out documents that score lower, before the generator reads them. With this and the next two, a
                question none of whose documents is left is asked without any.
            max_documents (`int`, *optional*):
                Keep so many of the best documents, in the order they were given; those of the configuration, or all,
                when left out.
            max_slots (`int`, *optional*):
                Keep the best documents that fit into so many memory embeddings; documents that do not fit are skipped.
            system_prompt (`str`, *optional*): In place of the model's own, for this call.
            generation_kwargs: Passed on to `generate`; the length is that of `model.generation_config`, or 128 new
                tokens, unless one is given.

        Returns:
            `str` for one question, `list[str]` for a list; with `return_reranking_scores` an `AnswerOutput`, which is
            a pair of that and the scores, one per document, with fields for what else is known.

        Raises:
            ValueError, TypeError: see `ScaleDownProcessor`; a prompt that leaves no room for the answer.
        """
        given = listed(questions)
        single = isinstance(given, str) or is_conversation(given)
        questions, documents = self.processor.check_texts(given, documents)
        conversations = self.processor.conversations(given, system_prompt)
        limits = (min_reranking_score, max_documents, max_slots)
        check_limits(min_reranking_score, max_documents=max_documents, max_slots=max_slots)
        generation_kwargs, max_new_tokens = with_length(generation_kwargs, self.generation_config)
        check_batch_size(batch_size)
        settings = PromptSettings(
            compression_rate, num_memory_tokens, limits, max_new_tokens, with_scores=return_reranking_scores
        )
        columns = [[] for _ in range(5)]
        for start in range(0, len(questions), batch_size):
            part = slice(start, start + batch_size)
            filled = fill_prompts(self, questions[part], documents[part], conversations[part], settings, start)
            sequences = _sequences(self.generate(**filled.batch, **filled.compressed, **generation_kwargs))
            start_of_answers = filled.batch["input_ids"].shape[1]
            answers = self.processor.decode_answers(sequences, start_of_answers)
            lengths = answer_lengths(sequences[:, start_of_answers:], generation_kwargs, self.generation_config)
            per_question = len(answers) // len(filled.scores)  # as many as sequences were asked for
            prompts = filled.batch["attention_mask"].sum(dim=1).tolist()
            prompts = [length for length in prompts for _ in range(per_question)]
            for column, values in zip(columns, (answers, filled.scores, filled.read, prompts, lengths), strict=True):
                column += values
        if single:
            several = len(columns[0]) > 1
            columns = [column if several and len(column) > 1 else column[0] for column in columns]
        return AnswerOutput(*columns) if return_reranking_scores else columns[0]

    @torch.no_grad()
    def prompt_embeddings(
        self,
        questions: str | list[str],
        documents: list[str] | list[list[str]] | None = None,
        compression_rate: int | None = None,
        num_memory_tokens: int | None = None,
        min_reranking_score: float | None = None,
        max_documents: int | None = None,
        max_slots: int | None = None,
        system_prompt: str | None = None,
    ) -> tuple[torch.FloatTensor, torch.LongTensor]:
        """
        Builds the prompts that `answer` would give to the generator, for an engine that reads embeddings.

        Args:
            questions, documents, compression_rate, num_memory_tokens, min_reranking_score, max_documents, max_slots,
            system_prompt: As in `answer`.

        Returns:
            `tuple`: embeddings `(batch, prompt_len, hidden)`, slots filled, and their mask `(batch, prompt_len)`, 0 on
            padding, which is at the left.

        Raises:
            ValueError, TypeError: as in `answer`.
        """
        given = listed(questions)
        questions, documents = self.processor.check_texts(given, documents)
        conversations = self.processor.conversations(given, system_prompt)
        check_limits(min_reranking_score, max_documents=max_documents, max_slots=max_slots)
        limits = (min_reranking_score, max_documents, max_slots)
        settings = PromptSettings(compression_rate, num_memory_tokens, limits)
        filled = fill_prompts(self, questions, documents, conversations, settings)
        return embed_prompts(self, filled), filled.batch["attention_mask"]

    @torch.no_grad()
    def rank(
        self,
        question: str,
        documents: list[str],
        top_k: int | None = None,
        return_documents: bool = False,
        batch_size: int = 64,
    ) -> list[dict]:
        """
        Ranks documents by relevance, in the return form of `sentence_transformers.CrossEncoder.rank`.

        Args:
            question (`str`): The question; of a list of messages, the last.
            documents (`list[str]`): Documents to rank; one of several chunks counts as its best chunk.
            top_k (`int`, *optional*): Return only the best.
            return_documents (`bool`, defaults to `False`): Add each document's text.
            batch_size (`int`, defaults to 64): Chunks scored at a time.

        Returns:
            `list[dict]`: `{"corpus_id": int, "score": float}` (and `"text"`), best first.

        Raises:
            ValueError, TypeError: see `ScaleDownProcessor`; the model was built without reranking.
        """
        require_reranking(self)
        if not isinstance(question, str) and not is_conversation(question):
            raise TypeError(f"question must be one string, got {type(question).__name__}; call rank once per question.")
        check_limits(top_k=top_k)
        questions, (documents,) = self.processor.check_texts(question, documents)
        if not documents:
            return []
        chunks = _compress_texts(self, questions, [documents], None, None, batch_size)
        scores = document_scores(chunks.reranking_scores, chunks.chunk_to_document, len(documents)).tolist()
        ranking = sorted(range(len(scores)), key=lambda i: -scores[i])[:top_k]
        results = [{"corpus_id": i, "score": scores[i]} for i in ranking]
        if return_documents:
            results = [{**result, "text": documents[result["corpus_id"]]} for result in results]
        return results

    def generate_from_text(
        self, questions: list[str], documents: list[list[str]], max_new_tokens: int | None = None
    ) -> list[str]:
        """
        Answers questions; the name and the arguments of published OSCAR and PISCO models.

        Args:
            questions (`list[str]`): Questions.
            documents (`list[list[str]]`): One list of documents per question.
            max_new_tokens (`int`, *optional*): Longest answer, in tokens; as in `answer` when left out.

        Returns:
            `list[str]`: One answer per question, decoded greedily.
        """
        answers = self.answer(questions, documents, max_new_tokens=max_new_tokens, do_sample=False)
        return [answers] if isinstance(answers, str) else answers

    @torch.no_grad()
    def compress_documents(self, documents: list[str], questions: list[str] | None = None) -> torch.FloatTensor:
        """
        Compresses documents one by one; the name and the arguments of published OSCAR and PISCO models.

        Args:
            documents (`list[str]`): Documents.
            questions (`list[str]`, *optional*):
                The question of each document. Without, documents are compressed for no question in particular, which
                is not what the model was trained for.

        Returns:
            `torch.FloatTensor` of shape `(n_docs, slots, hidden)`: The chunks of a long document follow each other;
            documents with fewer slots than the longest end in rows of zeros.

        Raises:
            TypeError: documents or questions are not lists.
            ValueError: as many questions as documents are needed.
        """
        if isinstance(documents, str) or isinstance(questions, str):
            raise TypeError("documents and questions must be lists of strings, one question per document.")
        documents, questions = listed(documents), listed(questions)
        if questions is not None and len(questions) != len(documents):
            raise ScaleDownError(f"{len(documents)} documents but {len(questions)} questions; pass one question each.")
        if not documents:
            raise ScaleDownError("documents is empty; pass at least one document.")
        asked = questions if questions is not None else ["-"] * len(documents)
        self.processor.check_texts(asked, [[document] for document in documents])
        queries = questions if questions is not None else [""] * len(documents)
        chunks = _compress_texts(self, queries, [[document] for document in documents], None, None, 64)
        return nn.utils.rnn.pad_sequence(chunks.by_document(), batch_first=True)  # (n_docs, slots, hidden)

    @torch.no_grad()
    def generate_from_compressed_documents_and_questions(
        self, questions: list[str], compressed_documents: torch.FloatTensor, max_new_tokens: int | None = None
    ) -> list[str]:
        """
        Answers from what `compress_documents` returned; name and arguments as in published OSCAR and PISCO models.

        Args:
            questions (`list[str]`): Questions.
            compressed_documents (`torch.FloatTensor` of shape `(n_docs, slots, hidden)`):
                The documents of all questions in a row, equally many for each.
            max_new_tokens (`int`, *optional*): Longest answer, in tokens; as in `answer` when left out.

        Returns:
            `list[str]`: One answer per question, decoded greedily.

        Raises:
            TypeError: questions is not a list.
            ValueError: the documents cannot be shared out equally, or have another width than the generator.
        """
        if isinstance(questions, str):
            raise TypeError("questions must be a list of strings.")
        questions = listed(questions)
        if questions:
            self.processor.check_texts(questions, None)
        memory = torch.as_tensor(compressed_documents)
        if memory.dim() != 3 or memory.shape[-1] != self.config.hidden_size:
            raise ScaleDownError(
                f"compressed_documents has shape {tuple(memory.shape)}, expected (n_docs, slots, "
                f"{self.config.hidden_size}) as compress_documents returns it."
            )
        if not questions or memory.shape[0] % len(questions) != 0:
            raise ScaleDownError(
                f"{memory.shape[0]} compressed documents cannot be shared out equally over {len(questions)} questions."
            )
        mask = memory.abs().sum(dim=-1) > 0  # (n_docs, slots)
        batch = self.processor.build_prompts(questions, mask.sum(dim=1).view(len(questions), -1).tolist())
        settings, max_new_tokens = with_length(
            {"max_new_tokens": max_new_tokens, "do_sample": False}, self.generation_config
        )
        check_context(self, batch, max_new_tokens, 0)
        sequences = self.generate(
            **batch.to(self.device),
            memory_embeddings=memory.to(self.device),
            memory_mask=mask.to(self.device),
            **settings,
        )
        return self.processor.decode_answers(sequences, batch["input_ids"].shape[1])


def _compress_texts(model: PreTrainedModel, questions, documents, compression_rate, num_memory_tokens, batch_size):
    check_batch_size(batch_size)
    batch = model.processor.encode_documents(questions, documents, compression_rate, num_memory_tokens)
    if not batch:
        raise ScaleDownError("documents is empty; there is nothing to compress.")
    compressed = compress_chunks(model, batch, batch_size)
    device = compressed.memory_embeddings.device
    compressed.chunk_to_document = batch["chunk_to_document"].to(device)
    compressed.document_to_example = batch["document_to_example"].to(device)
    return compressed


def _sequences(output) -> torch.LongTensor:
    """Token ids of what `generate()` returned, whichever form was asked for."""
    return output if isinstance(output, torch.Tensor) else output.sequences
