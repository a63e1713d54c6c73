"""The `rlsys` command. Only what a subcommand needs is imported, so that help and errors are quick.

Exit codes: 0 done; 1 the run failed, or a check found problems; 2 wrong input; 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from rlsys.config.load import ResolvedConfig

EXIT_FAILED = 1
EXIT_WRONG_INPUT = 2
EXIT_INTERRUPTED = 130
PIPE_WIDTH = 140
"""Columns of tables that do not go to a terminal."""

_EXAMPLE = "examples/countdown/demo.yaml"
_CONFIG_HELP = """
Any field of the config can be set after CONFIG, as --section.field value:

  --policy.lr 1e-5 --reward.reward_funcs countdown format --checkpoint.resume

`rlsys explain CONFIG` lists all fields.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except ValueError as error:
        # By this project's rules a ValueError of its own tells users about their input. One from
        # a library, deep in a run, is a bug: its traceback is needed.
        if not _raised_by_rlsys(error):
            raise
        print(f"rlsys {args.command}: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT


class _CommandParser(argparse.ArgumentParser):
    """Of a subcommand; one that takes a CONFIG says what is wrong when there is none in place."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does, which would tell of required `overrides`, or of unknown arguments."""
        words = list(args or [])
        if words[:1] == ["--config"]:
            words = words[1:]
        found, unknown = super().parse_known_args(words, namespace)
        if "config" not in found:
            return found, unknown
        if found.config and not Path(found.config).is_file():
            from rlsys.config.pasted_command import split_command

            if "=" in found.config or split_command(words).program:
                unknown = words  # a field=value, or another project's program, in its place
        if unknown or found.config is None:
            from rlsys.config.load import problems_of_words

            wrong = f"should stand before {unknown[0]}" if unknown else "is missing"
            others = problems_of_words(words) if unknown else None
            self.error(
                f"CONFIG, a YAML file, {wrong}, as in\n  {self.prog} {_EXAMPLE} --policy.lr 1e-5"
                + (f"\n\n{others}" if others else "")
            )
        return found, unknown


class _ShowVersion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Print it, and exit."""
        from importlib import metadata

        try:
            version = metadata.version("rlsys")
        except metadata.PackageNotFoundError:
            version = f"of no version: {Path(__file__).parent} is not installed"
        print(f"rlsys {version}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rlsys", description="GRPO for language models: Ray, megatron-core, vLLM."
    )
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="show the version")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=_CommandParser
    )
    for name, run, text in (
        ("grpo", _grpo, "train with GRPO"),
        ("explain", _explain, "show what a config means, without starting anything"),
    ):
        command = commands.add_parser(
            name,
            help=text,
            description=text,
            usage=f"rlsys {name} CONFIG [--section.field value ...]",
            epilog=_CONFIG_HELP,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("config", nargs="?", metavar="CONFIG", help="YAML file")
        command.add_argument("overrides", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
        command.set_defaults(run=run, help_of=command)

    doctor = commands.add_parser("doctor", help="check this machine, and say what is missing")
    doctor.add_argument(
        "--canary",
        nargs=argparse.REMAINDER,
        metavar="CONFIG",
        help="run this config with learning rate 0 (options of `rlsys grpo` may follow) and check "
        "that nothing changes",
    )
    doctor.set_defaults(run=_doctor)

    completions = commands.add_parser("completions", help="read the completions of a run")
    completions.add_argument("run_dir", metavar="RUN", type=Path, help="output_dir of the run")
    completions.add_argument("--follow", action="store_true", help="wait for new ones")
    completions.add_argument("--step", type=int, help="only those of this step")
    completions.add_argument("--limit", type=int, help="only so many groups")
    others = completions.add_mutually_exclusive_group()
    others.add_argument(
        "--eval", dest="split", action="store_const", const="eval", help="those of held-out prompts"
    )
    others.add_argument(
        "--filtered",
        dest="split",
        action="store_const",
        const="filtered",
        help="those that dynamic sampling left out",
    )
    completions.set_defaults(split="train")
    completions.set_defaults(run=_completions)

    data = commands.add_parser("data", help="look at the data of a config before training on it")
    preview = data.add_subparsers(dest="action", required=True, metavar="ACTION").add_parser(
        "preview",
        help="counts, columns, lengths, and a few rendered prompts",
        description="Counts, columns, lengths, and a few rendered prompts. Needs no Ray or GPU.",
        usage="rlsys data preview CONFIG [--rows N] [--section.field value ...]",
        epilog=_CONFIG_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    preview.add_argument("config", nargs="?", metavar="CONFIG", help="YAML file")
    preview.add_argument("overrides", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    preview.add_argument("--rows", type=int, default=3, help="prompts to show; default 3")
    preview.set_defaults(run=_preview, help_of=preview)

    _add_rewards(commands)
    return parser


def _add_rewards(commands: argparse._SubParsersAction[_CommandParser]) -> None:
    rewards = commands.add_parser("rewards", help="list reward functions, or try them")
    actions = rewards.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="name, settings, columns and source of each")
    trying = actions.add_parser("try", help="score completions of a file, without a model")
    for action, run in ((listing, _rewards_list), (trying, _rewards_try)):
        action.add_argument(
            *("--external_plugins", "--plugin"),
            nargs="+",
            default=[],
            metavar="FILE",
            help="plugins to load first",
        )
        action.set_defaults(run=run)
    trying.add_argument(
        "names", nargs="*", metavar="NAME", help="reward functions; without any, those of the run"
    )
    trying.add_argument(
        "--completions",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSONL of objects with `completion`, or completions.jsonl of a run, whose config.yaml "
        "then says what the options below do not. One group are the rows of one `prompt_id`; "
        "without it, neighbours of the same prompt and columns",
    )
    trying.add_argument(
        "--dataset",
        nargs="+",
        default=[],
        help="where the columns are, if neither in the run's data nor in the file of completions",
    )
    trying.add_argument(
        "--preprocessor", metavar="NAME", help="as data.preprocessor, for --dataset"
    )
    trying.add_argument("--params", default="{}", help="settings: '{NAME: {SETTING: VALUE}}'")
    trying.add_argument("--timeout_s", type=float, help="as reward.timeout_s")
    trying.add_argument("--limit", type=int, help="score only so many completions")
    trying.add_argument("--tokenizer", help="model folder or hub id, for completion_ids")


def _grpo(args: argparse.Namespace) -> int:
    if _asks_for_help(args):
        return 0
    resolved = _load_runnable(args.config, args.overrides)
    from rlsys.launch import run

    return _run_told("rlsys grpo", lambda: run(resolved))


def _load_runnable(path: str, overrides: Sequence[str]) -> ResolvedConfig:
    from rlsys.config.load import load_config
    from rlsys.preflight.checks import check_run
    from rlsys.problems import ProblemsError

    resolved = load_config(path, overrides)
    problems = check_run(resolved.config)
    if problems:
        folder = Path(resolved.config.output_dir)
        another = any("holds another run" in problem.text for problem in problems)
        note = _run_elsewhere(path, overrides, folder) if another else None
        raise ProblemsError(path, problems, note=note)
    return resolved


def _run_elsewhere(path: str, overrides: Sequence[str], folder: Path) -> str:
    """The user's own command, with an output_dir that is free."""
    from rlsys.files import unused_folder

    words, _ = _split_output_dir(overrides)
    command = ["rlsys", "grpo", path, *words, "--output_dir", str(unused_folder(folder))]
    return f"In another folder:\n  {shlex.join(command)}"


def _split_output_dir(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words without the first `--output_dir FOLDER`, and that."""
    words = list(overrides)
    for index, word in enumerate(words):
        name, has_value, _ = word.lstrip("-+").partition("=")
        if name.replace("-", "_") == "output_dir" and (has_value or word.startswith("-")):
            end = index + (1 if has_value else 2)
            return words[:index] + words[end:], words[index:end]
    return words, []


def _run_told(command: str, run: Callable[[], bool | None]) -> int:
    """Run something on Ray; False or a failure of an actor is EXIT_FAILED."""
    from rlsys.actors.group import ActorFailure, PhaseTimeout
    from rlsys.actors.ray_session import RayStartError
    from rlsys.rewards.pool.failures import RewardCodeError
    from rlsys.tracking.sampling_watch import TrainingStopped
    from rlsys.weight_sync.transport import WeightSyncError

    try:
        return EXIT_FAILED if run() is False else 0
    except (
        ActorFailure,
        PhaseTimeout,
        RayStartError,
        RewardCodeError,
        TrainingStopped,
        WeightSyncError,
    ) as error:
        # Who failed at what, below the failing actor's own traceback; the driver's is no news.
        print(f"\n{command}: the run failed.\n{error}", file=sys.stderr)
        return EXIT_FAILED


def _explain(args: argparse.Namespace) -> int:
    if _asks_for_help(args):
        return 0
    from rlsys.commands.explain import explain
    from rlsys.config.load import load_config

    resolved = load_config(args.config, args.overrides)
    return 0 if explain(resolved, _console()) else EXIT_FAILED


def _preview(args: argparse.Namespace) -> int:
    if _asks_for_help(args):
        return 0
    from rlsys.commands.data_preview import preview, split_rows_option
    from rlsys.config.load import load_config

    rows, overrides = split_rows_option(args.overrides)
    resolved = load_config(args.config, overrides)
    num_rows = args.rows if rows is None else rows
    return 0 if preview(resolved.config, _console(), num_rows=num_rows) else EXIT_FAILED


def _doctor(args: argparse.Namespace) -> int:
    if args.canary is not None:
        return _canary(args.canary)
    from rlsys.commands.doctor import examine

    return 0 if examine(_console()) else EXIT_FAILED


def _canary(arguments: list[str]) -> int:
    if not arguments:
        raise ValueError("--canary needs a config: rlsys doctor --canary CONFIG")
    path, *overrides = arguments
    # Nothing is kept, so a run that is already in the config's own folder is no obstacle.
    nowhere = Path(tempfile.gettempdir()) / f"rlsys-canary-{os.getpid()}"
    overrides, given = _split_output_dir(overrides)
    if given:
        print(f"note: {shlex.join(given)} has no effect: a canary run keeps nothing", flush=True)
    config = _load_runnable(path, [*overrides, "--output_dir", str(nowhere)]).config
    from rlsys.commands.canary import run_canary

    return _run_told("rlsys doctor --canary", lambda: run_canary(config, _console()))


def _completions(args: argparse.Namespace) -> int:
    from rlsys.commands.completions import show_completions

    show_completions(
        args.run_dir,
        follow=args.follow,
        step=args.step,
        limit=args.limit,
        split=args.split,
    )
    return 0


def _rewards_list(args: argparse.Namespace) -> int:
    from rlsys.commands.rewards_list import list_rewards

    list_rewards(args.external_plugins, _console())
    return 0


def _rewards_try(args: argparse.Namespace) -> int:
    from rlsys.commands.rewards_try import TryOptions, parse_params, try_rewards
    from rlsys.rewards.pool.failures import RewardCodeError

    options = TryOptions(
        names=args.names,
        completions=args.completions,
        dataset=args.dataset,
        preprocessor=args.preprocessor,
        plugins=args.external_plugins,
        params=parse_params(args.params),
        timeout_s=args.timeout_s,
        limit=args.limit,
        tokenizer=args.tokenizer,
    )
    try:
        return 0 if try_rewards(options, _console()) else EXIT_FAILED
    except RewardCodeError as error:
        print(f"\nrlsys rewards try: {error}", file=sys.stderr)
        return EXIT_FAILED


def _asks_for_help(args: argparse.Namespace) -> bool:
    """Everything behind CONFIG is for the config, except for a plea for help."""
    if not {"-h", "--help"} & set(args.overrides):
        return False
    args.help_of.print_help()
    return True


def _console() -> Console:
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=PIPE_WIDTH)


def _raised_by_rlsys(error: ValueError) -> bool:
    """Whether a `raise` in this package made `error`."""
    frames = traceback.extract_tb(error.__traceback__)
    return Path(frames[-1].filename).is_relative_to(Path(__file__).parent)


if __name__ == "__main__":
    sys.exit(main())
