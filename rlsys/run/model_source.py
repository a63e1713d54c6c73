"""The model that a user names: a run, a checkpoint, a folder of a model or adapter, a hub id."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from rlsys.config.dataset_spec import is_local_path
from rlsys.model.adapter_folder import CONFIG_FILE, is_adapter_folder
from rlsys.model.folder import find_model_folder, hub_answers, read_json, resolve_model_path
from rlsys.model.other_kinds import refuse_other_kind
from rlsys.model.stored_adapter import StoredAdapter, read_adapter
from rlsys.model.tokenizer_files import has_tokenizer
from rlsys.model.weight_files import INDEX, indexed_names, weight_files
from rlsys.run.folder import RunDir
from rlsys.run.kept import checkpoint_steps
from rlsys.run.manifest import model_problem

_CONFIGS = ("config.json", CONFIG_FILE)
_MOST_STEPS = 10
"""Steps that an error lists; of more it names the first and the last ones."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model that a user named, as a Hugging Face folder with weights and tokenizer."""

    name: str
    """What the user wrote."""
    folder: Path
    """Holds config.json, safetensors and tokenizer. A checkpoint of a run is such a folder."""
    run: RunDir | None = None
    """The run that trained it, if the user named a run or one of its folders."""
    step: int | None = None
    """Training steps of its weights, if the name of its folder says so."""
    adapter: StoredAdapter | None = None
    """The LoRA adapter that the user named; `folder` is its base."""

    @property
    def label(self) -> str:
        """Its name in tables: "runs/a step 20"."""
        if self.run is None or Path(self.name).resolve() == self.saved.resolve():
            return self.name
        return f"{self.name} {self.saved.name.replace('-', ' ')}"

    @property
    def saved(self) -> Path:
        """The folder that the user named, or that a run saved: of the adapter, or the model."""
        return self.folder if self.adapter is None else self.adapter.folder


def find_model(name: str, step: int | None = None) -> ModelSource:
    """The model that `name` stands for; one of the hub is downloaded.

    Args:
        name: a run's output_dir, its `checkpoints` folder, one checkpoint, a Hugging Face folder,
            a folder of a LoRA adapter or a hub id.
        step: the checkpoint of a run; None is the newest weights that the run saved.

    Raises:
        ValueError: it names nothing that can be loaded; the text says what it is, and what to do.
    """
    place = Path(name).expanduser()
    if place.is_dir():
        source = _in_folder(name, place, step)
    elif place.exists():
        raise ValueError(
            f"{name} is a file: name the folder of a model (with config.json), or of a run"
        )
    elif is_local_path(name):
        raise ValueError(f"there is no folder {name} on this machine")
    else:
        _refuse_step(name, step, "a model of the hub")
        find_model_folder(name)  # its errors say why a model cannot be read
        source = ModelSource(name, resolve_model_path(name, local_files_only=not hub_answers()))
    if (problem := model_problem(source.folder)) is not None:
        raise ValueError(
            f"{source.folder} is damaged: {problem}. Name another checkpoint (--step); `rlsys "
            "checkpoints RUN` lists those that are whole"
        )
    if is_adapter_folder(source.folder):
        source = _with_base(source)
    check_loadable(source.folder)
    return source


def _with_base(source: ModelSource) -> ModelSource:
    """The source of an adapter, with the folder of its base."""
    adapter = read_adapter(source.folder)
    try:
        find_model_folder(adapter.base)
        base = resolve_model_path(adapter.base, local_files_only=not hub_answers())
    except ValueError as error:
        raise ValueError(
            f"{adapter.folder} is a LoRA adapter, and its base cannot be read: {error}. "
            f"base_model_name_or_path in its {CONFIG_FILE} says where it is"
        ) from None
    return replace(source, folder=base, adapter=adapter)


def check_loadable(folder: Path) -> None:
    """Refuse a folder that transformers and vLLM cannot load.

    Raises:
        ValueError: config.json, weights or tokenizer are missing; the text says what to do.
    """
    refuse_other_kind(folder)
    if not read_json(folder / "config.json"):
        raise ValueError(f"{folder} holds no config.json, so it is not a Hugging Face model folder")
    named, found = indexed_names(folder), weight_files(folder)
    missing = sorted((named or set()) - {file.name for file in found})
    if missing:
        raise ValueError(
            f"{folder} lacks {', '.join(missing[:3])}, which {INDEX} names: download it again"
        )
    if not found:
        others = sorted(
            file.name for end in ("bin", "gguf", "pt") for file in folder.glob(f"*.{end}")
        )
        hint = f"; transformers can save its {others[0]} as safetensors" if others else ""
        raise ValueError(f"{folder} holds no .safetensors file, so no weights{hint}")
    if not has_tokenizer(folder):
        raise ValueError(
            f"{folder} holds no tokenizer: copy tokenizer.json and tokenizer_config.json of the "
            "model that it comes from into it"
        )


def _in_folder(name: str, place: Path, step: int | None) -> ModelSource:
    if place.name == "checkpoints" and not (place / "config.json").is_file():
        place = place.parent  # the folder of all checkpoints stands for its run
    run = RunDir(place)
    if _is_run(run):
        return _of_run(name, run, step)
    if place.name.endswith(".partial"):
        raise ValueError(f"{name} is not finished: the process that wrote it was stopped meanwhile")
    if not any((place / file).is_file() for file in _CONFIGS):
        raise ValueError(
            f"{name} is neither a model folder (it has no config.json) nor the output_dir of a run "
            "(it has no checkpoints, final or interrupted)"
        )
    _refuse_step(name, step, "a model folder")
    own_step = place.name.removeprefix("step-")
    parents = [RunDir(parent) for parent in place.resolve().parents[:2]]
    owner = next((parent for parent in parents if parent.holds(place) and _is_run(parent)), None)
    number = int(own_step) if owner is not None and own_step.isdigit() else None
    return ModelSource(name, place, owner, number)


def _is_run(run: RunDir) -> bool:
    """Whether a run left something here; a folder with config.json is a model, not a run."""
    return not (run.path / "config.json").is_file() and (
        run.config.is_file()
        or any(folder.is_dir() for folder in (run.checkpoints, run.hf, run.final))
    )


def _of_run(name: str, run: RunDir, step: int | None) -> ModelSource:
    """The checkpoint of a step, or the weights that the run saved last."""
    # A checkpoint holds the same as the folder of the same step in hf/.
    of_steps = {
        number: folder / f"step-{number}"
        for folder in (run.hf, run.checkpoints)
        for number in checkpoint_steps(folder)
    }
    steps = sorted(of_steps)
    saved = [folder for folder in (run.final, run.interrupted) if folder.is_dir()]
    if step is not None:
        if step not in steps:
            raise ValueError(f"{name} has no checkpoint of step {step}: {_there_is(steps, saved)}")
        return ModelSource(name, of_steps[step], run, step)
    if not steps and not saved:
        raise ValueError(
            f"{name} is a run that has saved no weights: {_there_is(steps, saved)}. "
            "checkpoint.save_steps says when it writes checkpoints"
        )
    newest = [(of_steps[number], number) for number in steps[-1:]]
    folder, number = max(
        [*newest, *((folder, None) for folder in saved)],
        key=lambda entry: _written_at(entry[0]),
    )
    return ModelSource(name, folder, run, number)


def _written_at(folder: Path) -> int:
    """When the config of a model or adapter was written, in nanoseconds."""
    configs = [folder / name for name in _CONFIGS if (folder / name).is_file()]
    return max((config.stat().st_mtime_ns for config in configs), default=0)


def _there_is(steps: list[int], saved: list[Path]) -> str:
    """What there is instead."""
    if not steps:
        there = ", ".join(f"{folder.name}/" for folder in saved)
        return "it has no checkpoints" + (f", only {there} (leave --step out)" if there else "")
    numbers = list(map(str, steps))
    if len(numbers) > _MOST_STEPS:
        numbers = [*numbers[:3], "...", *numbers[3 - _MOST_STEPS :]]
    return f"it has {', '.join(numbers)}"


def _refuse_step(name: str, step: int | None, what: str) -> None:
    if step is not None:
        raise ValueError(f"--step {step} is for a run, and {name} is {what}: leave it out")
