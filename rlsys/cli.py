"""The `rlsys` command: each subcommand is an entry of `COMMANDS` and a file of rlsys/commands.

Only the file of the subcommand is imported, so that help and errors are quick. The exit codes are
in rlsys/exit_codes.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from rlsys.completions_options import add_completions_options
from rlsys.exit_codes import DONE, FAILED, WRONG_INPUT, is_full_disk, is_users_mistake, of_error
from rlsys.export_options import add_export_options
from rlsys.infer_options import add_infer_options
from rlsys.interrupts import Stopped
from rlsys.problems import RunFailed

_MODULE_NAMES = str.maketrans(" -", "__")
"""What a command's name is in the name of its file."""
_EXAMPLES = {
    "sft": "examples/sft/smollm2.yaml",
    "preference": "examples/preference/demo.yaml",
    "reward-model": "examples/reward_model/reward_model.yaml",
    "distill": "examples/distillation/demo.yaml",
}
_EXAMPLE = "examples/countdown/demo.yaml"
"""A CONFIG for `_EXAMPLES`' command, and one for all others."""
_CONFIG_HELP = """
Any field of the config can be set after CONFIG, as --section.field value:

  --policy.lr 1e-5 {example} --checkpoint.resume

`rlsys explain CONFIG` lists all fields.
"""


_EVAL_HELP = """
MODEL_OR_RUN is the output_dir of a run, a checkpoint, a folder of a model or a
LoRA adapter, or a hub id. CONFIG is a YAML file with the data and rewards;
without it the run's own is taken. Its section eval says how often each prompt is sampled and how:

  rlsys eval runs/a config.yaml --eval.num_generations 8 --eval.temperature 0.6
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        module = import_module(f"rlsys.commands.{args.command.translate(_MODULE_NAMES)}")
        result = module.main(args)
        if isinstance(result, bool) or result is None:
            return FAILED if result is False else DONE
        return int(result)
    except (KeyboardInterrupt, RunFailed, OSError, ValueError) as error:
        text = _ending(args.command, error)
        if text is None:
            raise
        print(text, file=sys.stderr)
        return of_error(error)


def _ending(command: str, error: BaseException) -> str | None:
    """What a user reads in place of a traceback; None where the traceback is needed."""
    if isinstance(error, KeyboardInterrupt):
        return f"\n{error if isinstance(error, Stopped) else 'interrupted'}"
    if isinstance(error, RunFailed):
        # The message ends with the failing actor's traceback; the driver's own says nothing more.
        return f"\nrlsys {command}: the run failed.\n{error}"
    if isinstance(error, OSError) and is_full_disk(error):
        where = f" at {error.filename}" if error.filename else ""
        return f"\nrlsys {command}: {error.strerror}{where}: free some"
    return f"rlsys {command}: {error}" if is_users_mistake(error) else None


# --- the parser ----------------------------------------------------------------------------------


class _CommandParser(argparse.ArgumentParser):
    """Parses a subcommand; says how to write a missing or misplaced CONFIG."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, and check that CONFIG is the first word."""
        words = list(args or [])
        if words[:1] == ["--config"]:
            words = words[1:]
        from rlsys.commands.options_elsewhere import what_to_write_instead

        if text := what_to_write_instead(
            str(self.get_default("command")), words, self._option_string_actions
        ):
            self.exit(WRONG_INPUT, f"{self.prog}: {text}\n")
        found, unknown = super().parse_known_args(words, namespace)
        if "config" not in found:
            if unknown:  # the parser of all commands would show its own usage
                self.error(f"not understood: {' '.join(unknown)}; {self.prog} --help")
            return found, unknown
        if {"-h", "--help"} & set(found.overrides):
            self.print_help()
            self.exit()
        if found.config and not Path(found.config).is_file():
            from rlsys.config.pasted_command import split_command

            if "=" in found.config or split_command(words).program:
                unknown = words  # field=value, or another project's program, in place of CONFIG
        if unknown or found.config is None:
            self._explain_config(unknown, words)
        return found, unknown

    def _explain_config(self, before: list[str], words: list[str]) -> None:
        """Exit and say what CONFIG is, with all problems of the words."""
        from rlsys.config.load import problems_of_words

        wrong = f"should stand before {before[0]}" if before else "is missing"
        command = str(self.get_default("command"))
        others = problems_of_words(words, command) if before else None
        example = _EXAMPLES.get(command, _EXAMPLE)
        self.error(
            f"CONFIG, a YAML file, {wrong}, as in\n  {self.prog} {example} --policy.lr 1e-5"
            + (f"\n\n{others}" if others else "")
        )


class _ShowVersion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Print the version, and exit."""
        try:
            version = metadata.version("rlsys")
        except metadata.PackageNotFoundError:
            version = f"without a version: {Path(__file__).parent} is not installed"
        print(f"rlsys {version}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rlsys",
        description="Supervised training and GRPO of language models, full or LoRA: Ray, "
        "megatron-core, vLLM.",
    )
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="show the version")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_CommandParser)
    actions = {"": commands}
    for name, (text, add_arguments) in COMMANDS.items():
        group, _, action = name.rpartition(" ")
        if group not in actions:
            parent = commands.add_parser(group, help=GROUPS[group])
            actions[group] = parent.add_subparsers(required=True, metavar="ACTION")
        description = f"{text[0].upper()}{text[1:]}."
        command = actions[group].add_parser(action, help=text, description=description)
        command.set_defaults(command=name)
        add_arguments(command)
    return parser


def _sft(parser: argparse.ArgumentParser) -> None:
    _config(parser, example="--data.max_length 4096")


def _preference(parser: argparse.ArgumentParser) -> None:
    _config(parser, example="--preference.loss_type ipo")


def _reward_model(parser: argparse.ArgumentParser) -> None:
    _config(parser, example="--data.max_length 2048")


def _distill(parser: argparse.ArgumentParser) -> None:
    _config(parser, example="--distill.beta 0.1")


def _config(
    parser: argparse.ArgumentParser,
    options: str = "",
    example: str = "--reward.reward_funcs countdown format",
) -> None:
    parser.usage = f"{parser.prog} CONFIG {options}[--section.field value ...]"
    parser.epilog = _CONFIG_HELP.format(example=example)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="YAML file")
    parser.add_argument("overrides", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def _preview(parser: argparse.ArgumentParser) -> None:
    _config(parser, "[--rows N] ")
    parser.add_argument("--rows", type=int, default=3, help="prompts to show; default 3")


def _doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--canary",
        nargs=argparse.REMAINDER,
        metavar="CONFIG",
        help="run this config with learning rate 0 (options of `rlsys grpo` may follow) and check "
        "that nothing changes",
    )


def _run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN", type=Path, help="output_dir of the run")


def _dashboard(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "places",
        nargs="+",
        metavar="RUN_OR_PARENT",
        type=Path,
        help="output_dir of a run, or a folder with runs below it: new ones appear",
    )
    parser.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1: this machine only")
    parser.add_argument("--port", type=int, default=0, help="default: a free one")
    parser.add_argument("--open", action="store_true", help="open the page in a browser here")
    parser.add_argument(
        "--token",
        action="store_true",
        help="ask for a token on 127.0.0.1 too: other users of this machine can open the page",
    )


def _runs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "parents", nargs="+", metavar="PARENT", type=Path, help="folder of runs, or a run"
    )
    parser.add_argument("--format", choices=("text", "json"), default="text")


def _logs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN", type=Path, help="output_dir of the run")
    parser.add_argument("--role", help="only policy, reference, rollout, reward or driver")
    parser.add_argument("--rank", type=int, help="only this rank, engine or worker, from 0")
    parser.add_argument("--follow", action="store_true", help="wait for new lines")
    parser.add_argument("--lines", type=int, default=100, help="newest lines; default 100")


def _checkpoints(parser: argparse.ArgumentParser) -> None:
    _run(parser)
    parser.add_argument("--verify", action="store_true", help="read every byte")
    parser.add_argument("--metric", help="find the best one by this, such as eval/loss")


def _verify(parser: argparse.ArgumentParser) -> None:
    _run(parser)
    text = "completions of each kind to score again, or all; default 256"
    parser.add_argument("--sample", default="256", metavar="N", help=text)


def _eval(parser: argparse.ArgumentParser) -> None:
    forms = (
        "MODEL_OR_RUN... [CONFIG] [--section.field value ...]",
        "--server URL [NAME] CONFIG [--section.field value ...]",
        "--compare FOLDER FOLDER",
    )
    parser.usage = "\n       ".join(f"{parser.prog} {form}" for form in forms)
    parser.epilog = _EVAL_HELP
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("words", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    _eval_options(parser)
    parser.set_defaults(parser=parser, add_options=_eval_options)


def _eval_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--step", type=int, help="checkpoint of the run; default: newest")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="for results and completions; default: a new folder in evals/",
    )
    parser.add_argument(
        "--server",
        metavar="URL",
        help="ask a running OpenAI-compatible server",
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar="FOLDER",
        help="two evaluations: which differences are larger than noise?",
    )


def _replay(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{parser.prog} DUMP [--section.field value ...]"
    parser.add_argument("dump", metavar="DUMP", type=Path, help="a folder below dumps/ of a run")
    parser.add_argument("overrides", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def _plugins(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        *("--external_plugins", "--plugin"),
        nargs="+",
        default=[],
        metavar="FILE",
        help="plugins to load first",
    )


def _rewards_try(parser: argparse.ArgumentParser) -> None:
    _plugins(parser)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="reward functions; default: the run's"
    )
    parser.add_argument(
        "--completions",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSONL of objects with `completion`, or completions.jsonl of a run, whose config.yaml "
        "fills in the options below. Rows with one `prompt_id` are a group; without it, "
        "neighbours with the same prompt and columns",
    )
    parser.add_argument(
        "--dataset",
        nargs="+",
        default=[],
        help="dataset with the columns, if the run's data and the file of completions lack them",
    )
    parser.add_argument(
        "--preprocessor", metavar="NAME", help="as data.preprocessor, for --dataset"
    )
    parser.add_argument("--params", default="{}", help="settings: '{NAME: {SETTING: VALUE}}'")
    parser.add_argument("--timeout_s", type=float, help="as reward.timeout_s")
    parser.add_argument("--limit", type=int, help="completions to score at most")
    parser.add_argument("--tokenizer", help="model folder or hub id, for completion_ids")


GROUPS = {
    "data": "look at the data of a config before training on it",
    "rewards": "list reward functions, or try them",
}
"""First word of commands with two words -> help."""

COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "grpo": ("train with GRPO", _config),
    "sft": ("supervised fine-tuning, or continued pre-training", _sft),
    "preference": ("train on pairs of answers, or on labelled ones: DPO, KTO, ...", _preference),
    "reward-model": ("train a score head: reward models, classifiers, regression", _reward_model),
    "distill": ("train a student on what a teacher says of each token (GKD)", _distill),
    "explain": ("show what a config means, and check it; starts only reward functions", _config),
    "infer": (
        "chat with a model or a run, complete a file of prompts, or serve it",
        add_infer_options,
    ),
    "eval": ("held-out data and rewards of a config on any model: pass@k, errors", _eval),
    "doctor": ("check this machine, and say what is missing", _doctor),
    "completions": ("read, search and export the completions of a run", add_completions_options),
    "runs": ("list the runs in a folder: status, steps, best held-out, time", _runs),
    "dashboard": ("a page with curves, completions, time and health of runs", _dashboard),
    "logs": ("read what the actors of a run print", _logs),
    "checkpoints": ("list the checkpoints of a run: which are whole, and the best", _checkpoints),
    "verify": ("audit a run from its own files: what is recorded follows from the rest", _verify),
    "data preview": (
        "counts, columns, lengths, and a few rendered prompts; needs no Ray or GPU",
        _preview,
    ),
    "export": (
        "write a model or checkpoint as Hugging Face or megatron-core folder; needs no Ray or GPU",
        add_export_options,
    ),
    "replay": (
        "take an optimizer step again that was not finite, and find where that begins",
        _replay,
    ),
    "rewards list": ("name, settings, columns and source of each", _plugins),
    "rewards try": ("score completions of a file, without a model", _rewards_try),
}
"""Name -> help and arguments. `rewards try` runs `main` of rlsys/commands/rewards_try.py. Where a
`main` returns False, the exit code is 1."""


if __name__ == "__main__":
    sys.exit(main())
