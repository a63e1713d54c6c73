"""From dataset rows to prompts ready to sample from.

    spec         what an entry of data.dataset says
    raw          a row as a file has it, and files that are compressed
    json_text    JSON with errors that say where
    json_files   JSON and JSON Lines to rows
    readers      any text file to rows, with their lines
    tables       Parquet, Arrow, folders and the hub to rows
    preprocess   a user's function or class, row to row
    row_preprocessors   ms-swift's classes
    registered   datasets that a plugin registers by name
    rows         row formats to chat turns and columns
    turns        turns, calls and tools as people write them to messages
    render       chat turns to token ids
    sources      the above for one dataset of a config
    load         everything in memory: filters, counts, what rewards say of a row
    split        which prompts are held out
    streaming    rows when they are needed
    stream       either of them as the stream that rollouts take prompts from
    checks       a quick look, for `rlsys explain` and before a run
    usage        which reward functions ask for which columns, and refuse which rows
    preview      `rlsys data preview`
    jsonl        rows to a file, for the data preparation of examples

docs/data.md is for users.
"""

from rlsys.data.load import PromptData, load_checked_prompts, load_prompts
from rlsys.data.preprocess import preprocessors, register_preprocessor
from rlsys.data.registered import DatasetMeta, SubsetDataset, register_dataset
from rlsys.data.render import render_prompt
from rlsys.data.row_preprocessors import (
    AlpacaPreprocessor,
    AutoPreprocessor,
    MessagesPreprocessor,
    ResponsePreprocessor,
    RowPreprocessor,
)
from rlsys.data.spec import FILE_SUFFIXES
from rlsys.data.split import split_prompts

__all__ = [
    "FILE_SUFFIXES",
    "AlpacaPreprocessor",
    "AutoPreprocessor",
    "DatasetMeta",
    "MessagesPreprocessor",
    "PromptData",
    "ResponsePreprocessor",
    "RowPreprocessor",
    "SubsetDataset",
    "load_checked_prompts",
    "load_prompts",
    "preprocessors",
    "register_dataset",
    "register_preprocessor",
    "render_prompt",
    "split_prompts",
]
