"""Sampling and scoring held-out prompts with one model after the other."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType

# Imported before Ray, which reads the environment when it is imported.
from rlsys.actors.ray_env import check_cluster_answers  # isort: skip
from rich.console import Console
from rich.progress import Progress
from transformers import AutoTokenizer

from rlsys.actors.node_check import check_nodes
from rlsys.actors.placement import Placement
from rlsys.actors.ray_session import ray_session
from rlsys.actors.reward import RewardWorkers
from rlsys.actors.rollout import RolloutActors
from rlsys.commands.eval_results import Result, write_result
from rlsys.config import Config
from rlsys.config.load import save_config
from rlsys.config.local_paths import with_absolute_paths
from rlsys.config.roles import RoleName
from rlsys.data.sources import raise_if_any
from rlsys.engines.chat_server import Server
from rlsys.files import JsonlWriter
from rlsys.interrupts import interruptible
from rlsys.model.folder import resolve_model_path
from rlsys.model.shape import read_model_shape
from rlsys.preflight.before_start import load_checked_prompts
from rlsys.preflight.hub import use_cache_without_hub
from rlsys.problems import Problem, ProblemsError
from rlsys.rewards.columns import column_problems
from rlsys.rollout.evaluation import Evaluation
from rlsys.rollout.pipeline import RolloutPipeline
from rlsys.run.folder import RunDir
from rlsys.run.model_source import ModelSource
from rlsys.system import choose_device
from rlsys.tracking.completions import completion_rows
from rlsys.types import Prompt, RolloutGroup


@dataclass(frozen=True, slots=True)
class Task:
    """One model and its prompts."""

    label: str
    config: Config
    """With the model's folder."""
    sets: Mapping[str, list[Prompt]]
    """Held-out prompts by the name of their set, rendered for this model."""
    step: int = 0
    """Training steps of its weights, where they are known."""


class Evaluator:
    """Reward workers for all models, and engines for one model after the other.

    Completions are scored as in training: in the processes, with the time limits and the answers to
    failures that the section `reward` says.
    """

    def __init__(self, config: Config):
        # Without a policy there is no GPU to share with it.
        reward = config.reward.model_copy(update={"reward_model_placement": "own"})
        alone = {"reward": reward, "placement": "dedicated"}
        self._config = with_absolute_paths(config.model_copy(update=alone))
        self._tickets = itertools.count()
        self._stack = ExitStack()
        self._rewards: RewardWorkers | None = None

    def __enter__(self) -> Evaluator:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def read(self, source: ModelSource) -> Task:
        """What to do for a model.

        Raises:
            ValueError: the data, the rewards or the model do not fit each other.
        """
        path = str(source.folder.resolve())
        model = self._config.model.model_copy(update={"path": path})
        # A run's adapter is merged into the model already.
        policy = self._config.policy.model_copy(update={"lora": None})
        config = self._config.model_copy(update={"model": model, "policy": policy})
        read_model_shape(source.folder)
        return Task(source.label, config, held_out_sets(config), source.step or 0)

    def of_model(self, task: Task, folder: Path) -> Result:
        """Evaluate a model with vLLM, and write the results into `folder`.

        Raises:
            RunFailed: an engine or a reward function failed.
        """
        rewards, config = self._start(), task.config
        assert self._placement is not None
        check_nodes(config, self._placement.roles_of_nodes())  # the merged adapter, say
        engines = RolloutActors(
            config, device=self._device, place=partial(self._placement.options, "rollout")
        )
        try:
            print(f"{task.label}: starting vLLM on {self._device}", flush=True)
            engines.start()
            return self._run(task, engines, rewards, folder)
        finally:
            engines.close()

    def of_server(self, server: Server, folder: Path) -> Result:
        """Evaluate the model of a server, and write the results into `folder`; as `of_model`."""
        task = Task(server.model, self._config, held_out_sets(self._config))
        rewards = self._start(with_engines=False)
        engines = RolloutActors(self._config, device=self._device, server=server)
        try:
            engines.start()
            return self._run(task, engines, rewards, folder)
        finally:
            engines.close()

    def _start(self, *, with_engines: bool = True) -> RewardWorkers:
        """Start Ray and the reward workers, the first time."""
        if self._rewards is not None:
            return self._rewards
        check_cluster_answers()
        self._stack.enter_context(interruptible())
        self._stack.enter_context(ray_session())
        config = self._config
        self._device = choose_device(config)
        self._placement: Placement | None = None
        if with_engines or config.reward.models:
            names: list[RoleName] = ["rollout"] if with_engines else []
            names.append("reward_model")
            self._placement = Placement(config, device=self._device, names=names)
        placement = self._placement
        on_gpu = self._device == "cuda" and config.reward.models
        self._rewards = RewardWorkers(
            config.reward,
            run_values=config.run_values,
            plugins=config.data.external_plugins,
            place=partial(placement.options, "reward_model") if placement and on_gpu else None,
            place_worker=placement.reward_options if placement else None,
        )
        self._rewards.start()
        self._stack.callback(self._rewards.close)
        return self._rewards

    def _run(
        self, task: Task, engines: RolloutActors, rewards: RewardWorkers, folder: Path
    ) -> Result:
        start, config, label = time.monotonic(), task.config, task.label
        pipeline = RolloutPipeline(engines, rewards, timeout_s=config.rollout.timeout_s)
        evaluation = Evaluation(config, task.sets, self._tickets)
        folder.mkdir(parents=True)
        save_config(config, RunDir(folder).config)
        writer = JsonlWriter(RunDir(folder).eval_completions)
        pipeline.submit(evaluation.requests())
        progress = Progress(console=Console(stderr=True), disable=not sys.stderr.isatty())
        try:
            with progress:
                bar = progress.add_task(label, total=evaluation.total)
                while evaluation.done < evaluation.total:
                    what = f"evaluation of {label}"
                    for group in pipeline.wait(what, done=evaluation.done, total=evaluation.total):
                        taken = evaluation.take(group)
                        assert taken is not None, "only this evaluation has tickets"
                        writer.append(*completion_rows(task.step, taken, None))
                    progress.update(bar, completed=evaluation.done)
        finally:
            writer.close()
        groups: dict[str, list[RolloutGroup]] = evaluation.groups()
        return write_result(folder, config, label, groups, seconds=time.monotonic() - start)


def held_out_sets(config: Config) -> dict[str, list[Prompt]]:
    """The held-out prompts of a config by set, for the tokenizer of its model.

    Raises:
        ValueError: rows that cannot be read or that a reward function refuses, or missing columns.
    """
    use_cache_without_hub(config)
    tokenizer = AutoTokenizer.from_pretrained(
        resolve_model_path(config.model.path), trust_remote_code=False
    )
    # A share of the training rows is held out, or one of them may have a column to be renamed.
    if not config.data.split_dataset_ratio and not config.data.columns:
        alone = config.data.model_copy(update={"dataset": [], "streaming": False})
        config = config.model_copy(update={"data": alone})
    data = load_checked_prompts(config, tokenizer)
    raise_if_any(data.refused)
    problems = {
        text: None
        for name, prompts in data.held_out_sets.items()
        for text in column_problems(
            config, prompts[0].columns, f"the held-out data{f' {name}' if name else ''}"
        )
    }
    if problems:
        raise ProblemsError("the data", list(map(Problem, problems)))
    return data.held_out_sets
