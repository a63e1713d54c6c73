"""Models and datasets of ModelScope, downloaded by its own package.

MODELSCOPE_CACHE says where downloads are kept, MODELSCOPE_API_TOKEN is the user's token.
"""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal

REMEDY = (
    "run `pip install 'rlsys[modelscope]'` on every host, or set hub: hf to take models and "
    "datasets from the Hugging Face hub"
)


def download(
    name: str, kind: Literal["model", "dataset"], patterns: Sequence[str] | None = None
) -> Path:
    """The local folder of a repository, after its files were downloaded.

    If ModelScope does not answer, it is what was downloaded before.

    Args:
        name: `owner/name`.
        kind: which of the two the repository is.
        patterns: of the files that are wanted; None wants all.

    Raises:
        ValueError: the package is missing, or the repository cannot be read; the text says why.
    """
    try:
        from modelscope.hub.snapshot_download import snapshot_download
    except ImportError:
        raise ValueError(
            f"{name!r} is a {kind} of ModelScope, and the package that downloads it is missing: "
            f"{REMEDY}"
        ) from None
    offline = not _answers()
    try:
        found = snapshot_download(
            name,
            repo_type=kind,
            allow_patterns=None if patterns is None else list(patterns),
            local_files_only=offline,
        )
    # The package raises its own errors, errors of requests, and plain OSError and ValueError.
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        if offline:
            reason = "ModelScope does not answer, and it was not downloaded before"
        raise ValueError(
            f"{name!r} is not a {kind} of ModelScope that can be read from here ({reason}). If it "
            "is private, set MODELSCOPE_API_TOKEN to your token"
        ) from error
    return Path(found)


@cache
def _answers() -> bool:
    """Whether ModelScope can be reached; asked once, for at most 5 seconds.

    Its own client would retry for minutes.
    """
    from modelscope_hub.config import HubConfig

    try:
        with urllib.request.urlopen(str(HubConfig().endpoint), timeout=5):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
