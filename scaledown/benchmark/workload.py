"""What a benchmark reads and writes for a question."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """What is read and written for a question.

    Args:
        prompt_length: Tokens of the prompt beside the documents.
        num_documents: Documents of a question.
        document_length: Tokens of a document.
        query_length: Question tokens the compressor reads with each; the paper's 128 tokens include them.
        new_tokens: Tokens of the answer.
        compression_rate: Document tokens per slot.
        separator_length: Tokens between two documents of the prompt.
        chunk_length: Tokens the compressor reads at once; longer documents are cut evenly.
    """

    prompt_length: int = 128
    num_documents: int = 10
    document_length: int = 128
    query_length: int = 0
    new_tokens: int = 32
    compression_rate: int = 16
    separator_length: int = 1
    chunk_length: int = 128

    @property
    def slots(self) -> int:
        """Slots of all documents."""
        return self.num_documents * sum(
            -(-chunk // self.compression_rate) for chunk in self.chunks(self.document_length)
        )

    @property
    def frame_length(self) -> int:
        """Tokens of the generator's input that are no document's."""
        return self.prompt_length + (self.num_documents - 1) * self.separator_length

    @property
    def text_length(self) -> int:
        """Tokens of the generator's input with the documents as text."""
        return self.frame_length + self.num_documents * self.document_length

    def chunks(self, length: int) -> list[int]:
        """Tokens of the chunks a document is cut into.

        Args:
            length: Its tokens.

        Returns:
            One number for each chunk.
        """
        count = -(-length // self.chunk_length)
        return [length // count + (place < length % count) for place in range(count)]
