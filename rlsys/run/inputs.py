"""What a run read at its start, by its bytes: config, data, plugins and model files."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rlsys.config import RunConfig
from rlsys.config.dataset_spec import parse_spec
from rlsys.files import JsonlWriter
from rlsys.run.folder import RunDir

Kind = Literal["config", "data", "plugin", "model"]

WHOLE_BYTES = 64 << 20
"""Files up to this size are read whole."""
WHOLE_DATA_BYTES = 4 << 30
"""Data is read whole up to this size in all, because one row may change."""
NUM_SAMPLES, SAMPLE_BYTES = 64, 64 << 10
"""What of a larger file is read: training changes all tensors, so samples show it."""


@dataclass(frozen=True, slots=True)
class InputFile:
    """One file that a run read."""

    kind: Kind
    path: str
    bytes: int
    sha256: str
    """In hexadecimal digits."""
    of: Literal["all", "samples"]
    """What the sum is of: the file, or its first and last bytes and some between."""

    def problem(self) -> tuple[str, str] | None:
        """What the file is now and what it was, in words; None if it has not changed."""
        path = Path(self.path)
        if not path.is_file():
            return "no file", f"{self.bytes:,} bytes"
        if (size := path.stat().st_size) != self.bytes:
            return f"{size:,} bytes", f"{self.bytes:,} bytes"
        found = _sum_of(path, whole=self.of == "all")
        return None if found == self.sha256 else (f"SHA-256 {found}", f"SHA-256 {self.sha256}")


def record_inputs(
    config: RunConfig, run: RunDir, resumed_from: int | None, plugins: Iterable[Path] = ()
) -> None:
    """Append a line to inputs.jsonl: what this process reads. A disk that takes no line is a note.

    Args:
        config: as config.yaml has it.
        run: the run's folder.
        resumed_from: the step of the checkpoint that the run continues from.
        plugins: files of plugins, and those that they import.
    """
    try:
        files = list(_files(config, run, plugins))
        writer = JsonlWriter(run.inputs)
        writer.append(
            {
                "time": time.time(),
                "resumed_from": resumed_from,
                "files": [asdict(file) for file in files],
                "elsewhere": list(_elsewhere(config)),
            }
        )
        writer.close()
    except OSError as error:
        print(f"note: `rlsys verify` will not know what the run read: {error}", flush=True)


def recorded_files(line: dict[str, Any]) -> list[InputFile]:
    """The files on a line of inputs.jsonl.

    Raises:
        ValueError: it is another form.
    """
    try:
        return [InputFile(**file) for file in line["files"]]
    except (KeyError, TypeError):
        raise ValueError("it has no list of files") from None


def _files(config: RunConfig, run: RunDir, plugins: Iterable[Path]) -> Iterator[InputFile]:
    yield _input("config", run.config, whole=True)
    left = WHOLE_DATA_BYTES
    for path in _data_files(config):
        size = path.stat().st_size
        yield _input("data", path, whole=size <= max(left, WHOLE_BYTES))
        left -= size
    for path in sorted({path.resolve() for path in plugins if path.is_file()}):
        yield _input("plugin", path, whole=True)
    for name in _models(config):
        folder = Path(name)
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.is_file():
                yield _input("model", path, whole=path.stat().st_size <= WHOLE_BYTES)


def _data_files(config: RunConfig) -> Iterator[Path]:
    """The files of all data sets that lie on this machine, each once."""
    found: dict[Path, None] = {}
    for text in config.data.all_datasets:
        spec = parse_spec(text)
        if spec.is_local and spec.path.is_dir():
            found |= dict.fromkeys(sorted(p for p in spec.path.rglob("*") if p.is_file()))
        elif spec.is_local and spec.path.is_file():
            found[spec.path] = None
    yield from found


def _elsewhere(config: RunConfig) -> Iterator[str]:
    """What the run read from a hub: it is not summed."""
    for text in dict.fromkeys(config.data.all_datasets):
        if not parse_spec(text).path.exists():
            yield f"data {text}"
    for name in _models(config):
        if not Path(name).is_dir():
            yield f"model {name}"


def _models(config: RunConfig) -> list[str]:
    lora = config.policy.lora
    adapter = [] if lora is None or lora.path is None else [lora.path]
    return list(dict.fromkeys([*config.model_paths, *adapter]))


def _input(kind: Kind, path: Path, *, whole: bool) -> InputFile:
    size, absolute = path.stat().st_size, str(path.absolute())
    return InputFile(
        kind, absolute, size, _sum_of(path, whole=whole), "all" if whole else "samples"
    )


def _sum_of(path: Path, *, whole: bool) -> str:
    with path.open("rb") as file:
        if whole:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest, size = hashlib.sha256(), path.stat().st_size
        for number in range(NUM_SAMPLES):
            file.seek((size - SAMPLE_BYTES) * number // (NUM_SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
        return digest.hexdigest()
