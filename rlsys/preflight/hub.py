"""Runs without the Hugging Face hub: its clients retry for minutes before they use the cache."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from rlsys.config import RunConfig
from rlsys.config.dataset_spec import is_local_path, split_hub
from rlsys.data.preprocess import read_spec
from rlsys.model.folder import hub_answers
from rlsys.plugins.load import load_what_loads


def use_cache_without_hub(config: RunConfig) -> None:
    """Set HF_HUB_OFFLINE if the config has hub ids and the hub does not answer.

    It holds for this process and those that it starts.
    """
    from huggingface_hub import constants

    names = [
        path
        for path in config.model_paths
        if not (is_local_path(path) or Path(path).is_dir() or split_hub(path)[0] == "modelscope")
    ]
    # Plugins may register names of datasets. Problems of plugins and datasets are reported where
    # they are read.
    load_what_loads(config.plugins)
    for text in config.data.all_datasets:
        with contextlib.suppress(ValueError):
            spec = read_spec(text)
            names += [] if spec.is_local or spec.from_modelscope else [spec.name]
    if names and not constants.HF_HUB_OFFLINE and not hub_answers():
        print(
            "note: the Hugging Face hub does not answer; "
            f"{', '.join(dict.fromkeys(names))} can only come from the cache of downloads",
            flush=True,
        )
        os.environ["HF_HUB_OFFLINE"] = "1"
        constants.HF_HUB_OFFLINE = True
        if "datasets" in sys.modules:  # a plugin imported it, and it has read the variable
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True
