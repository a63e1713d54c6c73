"""Is the Hugging Face hub there? Its clients retry for minutes before they look into the cache."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from rlsys.config import Config
from rlsys.config.dataset_spec import is_local_path
from rlsys.data.preprocess import read_spec
from rlsys.model.folder import hub_answers
from rlsys.rewards import plugin_problems


def use_cache_without_hub(config: Config) -> None:
    """Take what is downloaded already if the config has hub ids and the hub does not answer.

    Here and in the processes that this one starts; `datasets` may be imported already.
    """
    from huggingface_hub import constants

    models = (config.model.path, config.reference_path, *config.reward.model_paths)
    names = [path for path in models if not is_local_path(path) and not Path(path).is_dir()]
    # Plugins may register what a dataset's name stands for. What is wrong with either of the two
    # is reported where they are read.
    list(plugin_problems("", [*config.data.external_plugins, *config.reward.external_plugins]))
    for text in (*config.data.dataset, *config.data.val_dataset):
        with contextlib.suppress(ValueError):
            spec = read_spec(text)
            names += [] if spec.is_local else [spec.name]
    if names and not constants.HF_HUB_OFFLINE and not hub_answers():
        print(
            "note: the Hugging Face hub does not answer; what is called "
            f"{', '.join(dict.fromkeys(names))} can only come from the cache of downloads",
            flush=True,
        )
        os.environ["HF_HUB_OFFLINE"] = "1"
        constants.HF_HUB_OFFLINE = True
        if "datasets" in sys.modules:  # by a plugin; it has read the variable
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True
