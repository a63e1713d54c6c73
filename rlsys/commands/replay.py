"""`rlsys replay DUMP`: take an optimizer step again that was not finite, and find the first place.

The step is the same: the batch, the weights that it began with, the config and its seeds. So on the
same machine and packages the numbers are the same, to the bit on CPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Imported before Ray, which reads the environment when it is imported.
from rlsys.actors.ray_session import ray_session  # isort: skip
import ray

from rlsys.actors.placement import Placement
from rlsys.actors.policy import PolicyActors, PolicyRank
from rlsys.algo.finite import PER_TOKEN, found_text, nonfinite_entries
from rlsys.config import Config, RewardModelConfig, RunConfig
from rlsys.config.load import load_config_as
from rlsys.config.local_paths import with_absolute_paths
from rlsys.config.method import schema_of_command
from rlsys.config.roles import RoleName
from rlsys.engines.step_dump import CONFIG, Step, StepDump, installed_packages, read_step
from rlsys.interrupts import interruptible
from rlsys.model.adapter_folder import is_adapter_folder
from rlsys.system import choose_device

if TYPE_CHECKING:
    from rlsys.engines.megatron.trace import Finding

MAX_ENTRIES = 10
"""Most entries of a field of the batch that are listed."""


def main(args: argparse.Namespace) -> bool:
    """Take the step of `args.dump` again; returns whether it is as it was in the run."""
    dump = read_step(args.dump)
    config = replay_config(dump, args.overrides)
    for line in about(dump):
        print(line, flush=True)
    with interruptible(), ray_session():
        findings, found = replay(dump, config)
    for line in report(dump.step, findings):
        print(line)
    if dump.fault.reason:
        print("The gradient of this batch can be computed here. In the run the ranks died with it.")
        return False
    in_run = found_text(dump.fault.found)
    if found == dump.fault.found:
        print(f"As in the run: {in_run}.")
        return True
    here = f"not finite here: {found_text(found)}" if found else "here everything is finite"
    print(
        f"In the run, not finite: {in_run}; {here}. Reasons can be other packages, another layout "
        "of ranks, kernels that add in another order, or memory that was damaged."
    )
    return False


class ReplayRank(PolicyRank):
    """A rank of the policy that takes one step again."""

    def replay(self, step: Step, adapter: Path | None) -> tuple[list[Finding], dict[str, int]]:
        """The first findings of this rank, and what is not finite on any rank.

        Args:
            step: the step.
            adapter: folder of the adapter's weights; None leaves what the rank started with.
        """
        from rlsys.engines.megatron.trace import StepTrace

        if adapter is not None:
            assert self.engine.adapters is not None, "see replay_config"
            self.engine.adapters.weights.load(adapter)
        self.engine.policy_version = step.policy_version
        return StepTrace(self.engine).run(step)


def replay_config(dump: StepDump, overrides: Sequence[str]) -> RunConfig:
    """The config of the run, changed by words of the command line, with the dump's weights."""
    schema = schema_of_command(dump.method)
    if schema is RewardModelConfig:
        raise ValueError(
            f"{dump.folder} is of `rlsys reward-model`, whose steps `rlsys replay` cannot take "
            "again: it looks at log-probs, and a score head has none. step.json in it names the "
            "numbers that were not finite"
        )
    config = with_absolute_paths(load_config_as(schema, dump.folder / CONFIG, overrides).config)
    if isinstance(config, Config):  # no engines share the policy's GPUs
        config = config.model_copy(update={"placement": "dedicated"})
    if dump.weights is None or is_adapter_folder(dump.weights):
        return config
    model = config.model.model_copy(update={"path": str(dump.weights.absolute())})
    return config.model_copy(update={"model": model})


def replay(dump: StepDump, config: RunConfig) -> tuple[list[Finding], dict[str, int]]:
    """Take the step on the connected cluster: findings in the order of computation, and a count."""
    device = choose_device(config)
    own: tuple[RoleName, ...] = ("policy",)
    placement = Placement(config, device=device, names=own)
    policy = PolicyActors(
        config,
        device=device,
        place=partial(placement.options, "policy"),
        rank_class=ReplayRank,
    )
    policy.start()
    is_adapter = dump.weights is not None and is_adapter_folder(dump.weights)
    adapter = dump.weights.absolute() if dump.weights is not None and is_adapter else None
    results: list[Any] = policy.call("replay", ray.put(dump.step), adapter)
    findings = sorted((one for found, _ in results for one in found), key=lambda one: one.key())
    return findings, results[0][1]


def about(dump: StepDump) -> Iterator[str]:
    """What is taken again, and which packages are others than in the run."""
    step, weights = dump.step, dump.weights or "those of model.path"
    tokens = int(step.batch.completion_mask[step.rows].sum())
    yield (
        f"Optimizer step {step.number} of the update of policy version {step.policy_version}: rows "
        f"{', '.join(map(str, step.rows))}, {tokens:,} trained tokens. Weights: {weights}"
    )
    if dump.fault.reason:
        yield f"note: the run ended in this step: {dump.fault.reason.splitlines()[-1]}"
    if dump.weights_version != step.policy_version:
        yield (
            f"note: the weights are those of version {dump.weights_version}, the newest that were "
            "saved, and the step began with others"
        )
    here = installed_packages()
    for name in sorted(here.keys() | dump.packages.keys()):
        if here.get(name) != dump.packages.get(name):
            was, now = dump.packages.get(name, "missing"), here.get(name, "missing")
            yield f"note: {name} is {now}, and was {was} in the run"
    for rank, names in dump.fault.weights.items():
        more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
        yield f"note: in the run, these weights of rank {rank} were not finite: {names[0]}{more}"


def report(step: Step, findings: Sequence[Finding]) -> Iterator[str]:
    """Where the step is not finite: in the batch, then in the order of computation."""
    places = []
    for name in PER_TOKEN:
        entries = [e for e in nonfinite_entries(step.batch, name) if e[0] in step.rows]
        for row, token, value in entries[:MAX_ENTRIES]:
            places.append(("batch", f"{name} of row {row}, token {token}: {value:g}"))
        if len(entries) > MAX_ENTRIES:
            places.append(("batch", f"{name}: {len(entries) - MAX_ENTRIES:,} more"))
    seen = set()
    for one in findings:
        if (one.phase, one.where) not in seen:  # ranks that share rows find the same
            seen.add((one.phase, one.where))
            places.append((one.phase, f"{one.where} (policy rank {one.rank})"))
    for what, where in places:
        yield f"{what:<14} {where}"
    if places:
        yield f"First: {places[0][0]}, {places[0][1]}"
