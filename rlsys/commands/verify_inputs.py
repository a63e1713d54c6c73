"""What a run read and what it saved, by their bytes: config, data, plugins, models, checkpoints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from rlsys.commands.verify_base import Checked, Difference, Finding, NotChecked
from rlsys.model.weight_files import MANIFEST_FILE
from rlsys.records import RunRecord
from rlsys.records.rows import Rows
from rlsys.run.inputs import InputFile, recorded_files
from rlsys.run.kept import checkpoint_steps
from rlsys.run.manifest import checkpoint_problem
from rlsys.text import counted


def check_inputs(record: RunRecord) -> Iterator[Finding]:
    """The config and the files that the run read are those that are here.

    Raises:
        Difference: the first that is not.
    """
    path = record.run.inputs
    starts = Rows(path).read()
    if not starts:
        yield NotChecked("config and data files", f"no {path.name}: an older rlsys wrote the run")
        return
    try:
        files = recorded_files(starts[-1])
    except ValueError as error:
        raise Difference(path.name, f"line {len(starts)}", str(error), "a list of files") from None
    counts, sampled = Counter[str](), 0
    for file in files:
        if file.kind == "config":
            file = _here(record, file)
        if (problem := file.problem()) is not None:
            raise Difference(file.path, file.kind, *problem, f"as {path.name} has it")
        counts[file.kind] += 1
        sampled += file.of == "samples"
    for kind, number in counts.items():
        yield Checked(f"{kind} files", f"{number:,} of {number:,} by size and SHA-256")
    if sampled:
        yield NotChecked(f"every byte of {counted(sampled, 'large file')}", "samples were summed")
    for name in starts[-1].get("elsewhere", []):
        yield NotChecked(name, "it came from a hub")
    _check_earlier_starts(record, starts)


def _here(record: RunRecord, file: InputFile) -> InputFile:
    """The sum of config.yaml, for the folder in which the run is now: it may have been moved."""
    path = str(record.run.config.absolute())
    return InputFile("config", path, file.bytes, file.sha256, file.of)


def _check_earlier_starts(record: RunRecord, starts: list[dict[str, object]]) -> None:
    """Data is the same in all processes that trained here.

    Raises:
        Difference: a run was continued with other data.
    """
    known: dict[str, tuple[int, str]] = {}
    for number, start in enumerate(starts, start=1):
        for file in recorded_files(start):
            if file.kind != "data":
                continue
            line, sha256 = known.setdefault(file.path, (number, file.sha256))
            if sha256 != file.sha256:
                where, what = f"{record.run.inputs.name}, line {number}", f"SHA-256 of {file.path}"
                raise Difference(where, what, file.sha256, sha256, f"line {line}")


def check_checkpoints(record: RunRecord) -> Iterator[Finding]:
    """Every byte of every checkpoint is what was written.

    Raises:
        Difference: the first checkpoint of which that is not so.
    """
    folder = record.run.checkpoints
    steps, without = checkpoint_steps(folder), 0
    for step in steps:
        checkpoint = folder / f"step-{step}"
        if (problem := checkpoint_problem(checkpoint, read_all=True)) is not None:
            where = f"{folder.name}/{checkpoint.name}"
            raise Difference(where, "files", problem, f"what {MANIFEST_FILE} lists")
        without += not (checkpoint / MANIFEST_FILE).is_file()
    if without:
        yield NotChecked(
            f"{counted(without, 'checkpoint')}", "no manifest: an older rlsys wrote it"
        )
    if steps:
        yield Checked("checkpoints", f"{len(steps) - without} of {len(steps)}, every byte")
