"""The order in which a run reads its rows, where those of like length come together."""

from collections.abc import Callable
from typing import Any

import datasets
import torch
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import has_length

from .cache import CachedDataset


def record_length(record: dict[str, Any], stage: str) -> int:
    """Say how long a record is compared with others; characters tell, without a tokenizer.

    Args:
        record: A question with its documents.
        stage: The stage that reads it.

    Returns:
        Characters of question and documents; in the stage `pointer` of question and longest document, since the
        compressor runs alone there and all chunks of a batch are padded to the longest of them.
    """
    lengths = list(map(len, record["documents"]))
    return len(record["query"]) + (max(lengths, default=0) if stage == "pointer" else sum(lengths))


class EpochLengthGroupedSampler(LengthGroupedSampler):
    """Questions of like length together, in an order that seed and epoch alone decide, so that a run can go on.

    Args:
        seed: Decides the order.
        epoch: Returns the number of the starting epoch; asked for, because skipping batches hides the sampler.
        args, kwargs: As in `LengthGroupedSampler`.
    """

    def __init__(self, seed: int, epoch: Callable[[], int], *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seed, self.epoch = seed, epoch

    def __iter__(self):
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch())
        return super().__iter__()


class SamplesByLength:
    """Goes before a `Trainer`, which knows the lengths of rows only where they hold token ids, or a column of lengths.

    Training reads rows of like length together where `train_sampling_strategy` asks for it; evaluation reads them as
    they come.
    """

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy == "group_by_length":
            lengths, column = None, self.args.length_column_name
            if isinstance(dataset, CachedDataset):
                lengths = dataset.lengths
            elif isinstance(dataset, datasets.Dataset) and column in dataset.column_names:
                lengths = list(dataset[column])
            if lengths is not None:
                group = self.args.train_batch_size * self.args.gradient_accumulation_steps
                seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
                return EpochLengthGroupedSampler(seed, lambda: int(self.state.epoch or 0), group, lengths=lengths)
        return super()._get_train_sampler(train_dataset)

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler | None:
        # The Trainer's own would look for lengths here too, and stop the run where it finds none.
        if self.args.train_sampling_strategy != "group_by_length" or not has_length(eval_dataset):
            return super()._get_eval_sampler(eval_dataset)
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None
