"""The model of the best checkpoint."""

from __future__ import annotations

import shutil

from rlsys.config import CheckpointConfig
from rlsys.files import replacing_folder
from rlsys.model.weight_files import OF_THE_RUN
from rlsys.run.choice import choose_checkpoint
from rlsys.run.folder import RunDir


def write_best_model(run: RunDir, config: CheckpointConfig) -> int | None:
    """Copy the model of the best checkpoint that is whole to `run.final`.

    Returns:
        its step; None if there is no such checkpoint, which is said.
    """
    wanted = config.model_copy(update={"resume": "best"})
    choice = choose_checkpoint(run, wanted, read_all=True)
    for step, problem in choice.damaged.items():
        print(f"warning: the checkpoint of step {step} is damaged: {problem}", flush=True)
    if choice.step is None:
        reason = choice.problem or f"there is no checkpoint in {run.checkpoints}"
        print(f"warning: the model of the last step is the final one: {reason}", flush=True)
        return None
    source = run.checkpoints / f"step-{choice.step}"
    with replacing_folder(run.final) as partial:
        for file in source.iterdir():
            if file.is_file() and file.name not in OF_THE_RUN:
                shutil.copyfile(file, partial / file.name)
    return choice.step
