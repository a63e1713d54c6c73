"""Where a model's folder is, and the JSON files in it."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from functools import cache
from pathlib import Path
from typing import Any

from rlsys.config.dataset_spec import is_local_path, split_hub
from rlsys.config.local_paths import check_is_here
from rlsys.model import modelscope

_TOKENIZER_PATTERNS = ["*.json", "*.txt", "*.jinja", "*.model"]
_PATTERNS = [*_TOKENIZER_PATTERNS, "*.safetensors"]
_LFS_POINTER = b"version https://git-lfs"


@cache
def hub_answers() -> bool:
    """Whether the Hugging Face hub can be reached; asked once, for at most 5 seconds.

    The hub's own client would retry for half a minute for every file.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        with urllib.request.urlopen(constants.ENDPOINT, timeout=5):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


def find_model_folder(path: str) -> Path:
    """The folder that holds config.json of a model folder or hub id, downloading only that file.

    Raises:
        ValueError: neither a folder here nor a readable hub model.
    """
    if Path(path).is_dir():
        return Path(path)
    if is_local_path(path):
        raise ValueError(f"there is no model folder {path!r} on this machine")
    hub, path = split_hub(path)
    if hub == "modelscope":
        return modelscope.download(path, "model", ["config.json"])
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    try:
        config = hf_hub_download(path, "config.json", local_files_only=not hub_answers())
    except (HFValidationError, HfHubHTTPError, EntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if hub_answers() else "the hub does not answer"
        if isinstance(error, GatedRepoError):
            reason = "it is gated: ask for access on its page, and set HF_TOKEN to your token"
        elif isinstance(error, RepositoryNotFoundError):
            reason = "the hub does not have it, or your token (HF_TOKEN) may not read it"
        raise ValueError(
            f"{path!r} is neither a folder on this machine nor a hub model that can be read from "
            f"here ({reason})"
        ) from None
    return Path(config).parent


def resolve_model_path(path: str, *, local_files_only: bool = False) -> Path:
    """The local folder of a model: `path` itself, or the downloaded snapshot of a hub id.

    Args:
        path: model folder or hub id.
        local_files_only: take a snapshot of the Hugging Face hub that was downloaded before.

    Raises:
        ValueError: `path` is a folder that this host does not have; ModelScope cannot be read.
    """
    check_is_here(path)
    if Path(path).is_dir():
        return Path(path)
    hub, path = split_hub(path)
    if hub == "modelscope":
        return modelscope.download(path, "model", _PATTERNS)
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(path, allow_patterns=_PATTERNS, local_files_only=local_files_only)
    )


def tokenizer_source(path: str) -> str:
    """What transformers loads the tokenizer of a model folder or hub id from, without its weights.

    Raises:
        ValueError: ModelScope cannot be read.
    """
    hub, name = split_hub(path)
    if hub == "modelscope" and not Path(path).is_dir():
        return str(modelscope.download(name, "model", _TOKENIZER_PATTERNS))
    return path if Path(path).is_dir() else name


def read_json(file: Path) -> dict[str, Any]:
    """What a JSON file of a model folder says; empty without the file.

    Raises:
        ValueError: the file is not a JSON object; the text says what to do.
    """
    if not file.is_file():
        return {}
    refuse_lfs_pointer(file)
    try:
        values = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}. Download it again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} is not a JSON object: download it again")
    return values


def refuse_lfs_pointer(file: Path) -> None:
    """Raise ValueError if a clone left the file to Git LFS."""
    with file.open("rb") as content:
        if content.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ValueError(
                f"{file} is a pointer of Git LFS, not the file: run `git lfs pull` in {file.parent}"
            )
