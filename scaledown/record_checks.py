"""What records must be like for a run to end: checked before its first step."""

from collections.abc import Mapping

import datasets

from .arguments import DataArguments
from .records import RecordError


def check_documents(data: Mapping[str, datasets.Dataset], data_args: DataArguments) -> None:
    """Check that there is something to compress.

    Args:
        data: Records by split, `train` and perhaps `eval`.
        data_args: Names their files, and says whether questions alone are meant.

    Raises:
        RecordError: No record of a split has a document.
    """
    if data_args.closed_book:
        return
    for name, records in data.items():
        if not any(records["documents"]):
            raise RecordError(
                f"{name}_file={getattr(data_args, f'{name}_file')} has {len(records)} records and not one document, "
                "expected some to compress. prepare_data.py adds them: --documents_column names the column of a table "
                "that holds them, --corpus retrieves them. Set closed_book=true to train on questions alone."
            )
