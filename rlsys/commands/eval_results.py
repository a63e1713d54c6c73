"""Results of evaluations: their files, the table, and differences that are more than noise."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlsys.algo.evaluation import Difference, Estimate, paired_difference
from rlsys.config import Config
from rlsys.files import encode_row, path_exists, replacing, unused_folder
from rlsys.problems import Problem, ProblemsError
from rlsys.rollout.evaluation import pass_values, prompt_means, reward_estimates, score_estimates
from rlsys.text import counted
from rlsys.types import RolloutGroup

RESULT_FILE = "eval.json"
CONFIDENCE = 0.95
Scores = dict[str, dict[str, Any]]
"""Set -> key of the metric -> value."""


@dataclass(frozen=True, slots=True)
class Result:
    """One evaluation of one model."""

    model: str
    about: dict[str, Any]
    """Everything that has to be equal if two evaluations are to be compared."""
    scores: Scores
    """Set -> metric -> mean, stderr, num_prompts."""
    prompts: Scores
    """Set -> metric -> one value for each prompt; null: without one."""
    num_completions: int
    num_cut: int
    seconds: float
    folder: str = ""


# --- files ---------------------------------------------------------------------------------------


def result_folders(out: Path | None, config: Config, labels: Sequence[str]) -> list[Path]:
    """The folder of each model: new ones in evals/, or `out` itself or folders in it.

    Raises:
        ValueError: `out` holds something already.
    """
    if out is not None and path_exists(out) and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} exists already: name another folder, or delete it")
    names = [re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-.") or "model" for label in labels]
    names = [f"{name}-{names[:i].count(name) + 1}" if name in names[:i] else name
             for i, name in enumerate(names)]  # fmt: skip
    if out is not None:
        return [out] if len(names) == 1 else [out / name for name in names]
    places = [Path("evals") / name for name in names]
    return [unused_folder(place) if path_exists(place) else place for place in places]


def write_result(
    folder: Path,
    config: Config,
    label: str,
    groups_of: Mapping[str, Sequence[RolloutGroup]],
    *,
    seconds: float,
) -> Result:
    """Compute the scores and write eval.json into `folder`."""
    scores: Scores = {}
    for name, groups in groups_of.items():
        estimates = score_estimates(config, groups) | reward_estimates(groups)
        scores[name] = {key: asdict(one) for key, one in estimates.items()}
    completions = [c for groups in groups_of.values() for g in groups for c in g.completions]
    result = Result(
        label,
        _about(config, groups_of),
        scores,
        {name: _values_of_prompts(config, groups) for name, groups in groups_of.items()},
        len(completions),
        sum(completion.finish_reason == "length" for completion in completions),
        seconds,
        str(folder),
    )
    with replacing(folder / RESULT_FILE) as scratch:
        scratch.write_bytes(encode_row(asdict(result)))
    return result


def read_result(folder: Path) -> Result:
    """The result in a folder.

    Raises:
        ValueError: it does not hold one.
    """
    file = folder / RESULT_FILE if folder.is_dir() else folder
    if not file.is_file():
        inside = sorted(str(found.parent) for found in folder.glob(f"*/{RESULT_FILE}"))
        hint = f". There are some in {', '.join(inside)}" if inside else ""
        raise ValueError(
            f"--compare {folder}: it is not the folder of a finished evaluation, which holds "
            f"{RESULT_FILE}{hint}"
        )
    try:
        values = json.loads(file.read_text("utf-8"))
        return Result(**{field.name: values[field.name] for field in fields(Result)})
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"--compare {folder}: {file} was not written by rlsys eval") from None


def _about(config: Config, groups_of: Mapping[str, Sequence[RolloutGroup]]) -> dict[str, Any]:
    """What was evaluated and how, by words that an error can use; in JSON's types."""
    rollout, own, reward = config.rollout, config.eval, config.reward
    gate = config.eval_correct
    about = {
        "data": {
            name or "held-out": {"prompts": len(groups), "sha256": _fingerprint(groups)}
            for name, groups in groups_of.items()
        },
        "rewards": {
            "reward_funcs": reward.names,
            "reward_weights": reward.reward_weights or [1.0] * len(reward.names),
            "reward_params": reward.params,
            "gate": reward.gate,
            "on_error": reward.on_error,
        },
        "sampling": {
            "num_generations": own.num_generations,
            "temperature": rollout.temperature if own.temperature is None else own.temperature,
            "top_p": rollout.top_p if own.top_p is None else own.top_p,
            "top_k": rollout.top_k if own.top_k is None else own.top_k,
            **rollout.min_p_and_penalties,
            "max_completion_length": rollout.max_completion_length,
            "stop": rollout.stop,
            "stop_token_ids": rollout.stop_token_ids,
            "skip_special_tokens": rollout.skip_special_tokens,
        },
        "correct": f"{gate.by} >= {gate.threshold:g}",
    }
    known: dict[str, Any] = json.loads(encode_row(about))
    return known


def _fingerprint(groups: Sequence[RolloutGroup]) -> str:
    """A hash of messages and columns, not of tokens: models may have different tokenizers."""
    digest = hashlib.sha256()
    for group in groups:
        prompt = group.prompt
        digest.update(repr((prompt.prompt_id, prompt.messages, prompt.columns)).encode())
    return digest.hexdigest()


def _values_of_prompts(config: Config, groups: Sequence[RolloutGroup]) -> dict[str, list[float]]:
    """One value for each prompt of the metrics that are means over prompts; NaN for none."""
    gate = config.eval_correct
    by_name = {
        name: [[reward.by_name[name] for reward in group.rewards] for group in groups]
        for name in config.reward.names
    }
    found: dict[str, list[float]] = {}
    for k in config.eval_ks:
        passed = [pass_values(own, gate.threshold, k) for own in by_name[gate.by]]
        found[f"pass@{k}"] = [own[0] if own else math.nan for own in passed]
    totals = [[reward.total for reward in group.rewards] for group in groups]
    found["reward"] = prompt_means(totals)
    return found | {f"rewards/{n}/mean": prompt_means(values) for n, values in by_name.items()}


# --- comparison ----------------------------------------------------------------------------------


def compare_results(first: Result, second: Result) -> dict[str, dict[str, Difference]]:
    """second - first, paired by prompt: set -> metric -> difference.

    Raises:
        ProblemsError: data, rewards or sampling differ; it names all that does.
    """
    problems = list(map(Problem, _differences(first.about, second.about)))
    if problems:
        head = f"the comparison of {first.model} and {second.model}"
        raise ProblemsError(head, problems, note="Evaluate both with one config.")
    return {
        name: {
            key: paired_difference(_numbers(values), _numbers(second.prompts[name][key]))
            for key, values in metrics.items()
        }
        for name, metrics in first.prompts.items()
    }


def _differences(first: Any, second: Any, name: str = "") -> list[str]:
    if isinstance(first, dict) and isinstance(second, dict):
        keys = dict.fromkeys([*first, *second])
        found = [
            _differences(first.get(key), second.get(key), f"{name}.{key}" if name else key)
            for key in keys
        ]
        return [text for texts in found for text in texts]
    return [] if first == second else [f"{name} differs: {first} and {second}"]


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


# --- tables --------------------------------------------------------------------------------------


def print_results(results: Sequence[Result], console: Console) -> None:
    """One column for each model, one row for each metric of each set."""
    first = results[0]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("mean ± standard error", no_wrap=True)
    for result in results:
        table.add_column(Text(result.model, overflow="fold"), justify="right")
    for name, metrics in first.scores.items():
        size = first.about["data"][name or "held-out"]["prompts"]
        table.add_row(Text(f"{name or 'held-out'}, {counted(size, 'prompt')}", style="italic"))
        keys = dict.fromkeys(key for result in results for key in result.scores.get(name, metrics))
        for key in keys:
            cells = [_cell(result.scores.get(name, {}).get(key)) for result in results]
            table.add_row(Text(f"  {key}"), *cells)
    cut = [f"{result.num_cut:,} of {result.num_completions:,}" for result in results]
    table.add_row("cut completions", *cut)
    console.print(table)
    console.print(f"correct: {first.about['correct']}", style="dim")
    for result in results:
        console.print(Text(f"completions: rlsys completions {result.folder} --eval", style="dim"))


def _cell(score: dict[str, Any] | None) -> str:
    if score is None:
        return "-"
    mean, stderr = (_numbers([score[name]])[0] for name in ("mean", "stderr"))
    return str(Estimate(mean, stderr, score["num_prompts"]))


def print_comparison(
    differences: Mapping[str, Mapping[str, Difference]],
    first: Result,
    second: Result,
    console: Console,
) -> None:
    """A row for each metric: the difference, its confidence interval, and what it means."""
    console.print()
    console.print(Text(f"{second.model} - {first.model}", style="bold"))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("", "difference", f"{CONFIDENCE:.0%} interval", "p"):
        table.add_column(title, no_wrap=True, justify="left" if not title else "right")
    table.add_column("")
    for name, metrics in differences.items():
        table.add_row(Text(name or "held-out", style="italic"))
        for key, one in metrics.items():
            table.add_row(Text(f"  {key}"), *_difference_cells(one))
    console.print(table)
    console.print(
        "Two-sided paired t-test over prompts: p is the probability of a mean difference at least "
        "this large if the prompts' differences were normal draws around 0. Each row is a test of "
        f"its own: of 20 rows without any difference, one has p < {1 - CONFIDENCE:.2f} on average.",
        style="dim",
    )


def _difference_cells(one: Difference) -> tuple[str, str, str, Text]:
    if math.isnan(one.p_value):
        return _signed(one.mean), "-", "-", Text(f"{counted(one.num_prompts, 'prompt')}: too few")
    low, high = one.mean - one.margin, one.mean + one.margin
    if one.p_value >= 1 - CONFIDENCE:
        verdict = Text("within noise", style="dim")
    else:
        verdict = Text("more than noise", style="bold green" if one.mean > 0 else "bold red")
    p_value = "<0.0001" if one.p_value < 1e-4 else f"{one.p_value:.4f}"
    return _signed(one.mean), f"{_signed(low)} to {_signed(high)}", p_value, verdict


def _signed(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:+.3f}"
