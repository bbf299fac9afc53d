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
"""What `ScaleDownModel.answer` returns besides answers."""


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
