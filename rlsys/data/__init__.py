"""From the rows of datasets to prompts and samples; docs/data.md is for users.

One `Row` goes through these stages, for training in memory, streams, the preview and `rewards try`:

    open         sources, with text_files, json_files, file_bytes; tables for all else
    preprocess   preprocess, row_preprocessors (ms-swift's classes), registered (datasets by name)
    parse        formats (which columns hold the prompt), turns (turns, calls and tools)
                 targets (for samples: which turns are trained on, texts, self-cognition)
    render       render: the chat template; render_samples, target_mask: targets, to the token
    load         load: everything in memory, split; streams/: the order in which rows come
                 samples: what differs between samples and prompts
"""

from rlsys.config.dataset_spec import FILE_SUFFIXES
from rlsys.data.load import PromptData, load_prompts, split_prompts
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
from rlsys.data.samples import SampleData, SampleRules, load_samples

__all__ = [
    "FILE_SUFFIXES",
    "AlpacaPreprocessor",
    "AutoPreprocessor",
    "DatasetMeta",
    "MessagesPreprocessor",
    "PromptData",
    "ResponsePreprocessor",
    "RowPreprocessor",
    "SampleData",
    "SampleRules",
    "SubsetDataset",
    "load_prompts",
    "load_samples",
    "preprocessors",
    "register_dataset",
    "register_preprocessor",
    "render_prompt",
    "split_prompts",
]
