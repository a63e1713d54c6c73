"""`rlsys eval MODEL_OR_RUN... CONFIG`: a config's held-out data and rewards on any model."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path

from rlsys.commands.console import make_console
from rlsys.commands.eval_results import (
    Result,
    compare_results,
    print_comparison,
    print_results,
    read_result,
    result_folders,
)
from rlsys.commands.merged_model import with_merged_adapter
from rlsys.config import Config
from rlsys.config.load import load_config
from rlsys.config.method import schema_of
from rlsys.problems import ProblemsError
from rlsys.run.model_source import ModelSource, find_model

_SUFFIXES = (".yaml", ".yml")


def main(args: argparse.Namespace) -> None:
    """Evaluate what the command line names, or compare two evaluations."""
    words = _parse_words(args)
    console = make_console()
    if args.compare is not None:
        if words:
            raise ValueError(
                f"--compare takes two evaluations, and nothing else: {' '.join(words)}"
            )
        first, second = map(read_result, args.compare)
        print_comparison(compare_results(first, second), first, second, console)
        return
    names = list(takewhile(lambda word: not word.startswith("-"), words))
    overrides = words[len(names) :]
    models, path = _split(names)
    if args.server is not None:
        if path is None:
            raise ValueError("--server needs CONFIG, which says what is evaluated and how")
        if args.step is not None or len(models) > 1:
            raise ValueError(
                "--server URL [NAME] CONFIG takes one name of the server, and no --step"
            )
    elif not models:
        raise ValueError("name a model or a run to evaluate: rlsys eval MODEL_OR_RUN... CONFIG")
    found = [] if args.server is not None else [find_model(name, args.step) for name in models]
    config = load_config(path or _config_of(found), overrides).config
    _check(config)
    sources = [with_merged_adapter(source) for source in found]
    results = _evaluate(args, config, sources, models)
    print_results(results, console)
    first, *others = results
    for other in others:
        try:
            differences = compare_results(first, other)
        except ProblemsError as error:  # another tokenizer may drop other prompts as too long
            console.print(f"\nnot compared: {error}", highlight=False, markup=False)
        else:
            print_comparison(differences, first, other, console)


def _parse_words(args: argparse.Namespace) -> list[str]:
    """The words that are not options of this command, which may stand anywhere among them."""
    parser: argparse.ArgumentParser = args.parser
    if {"-h", "--help"} & set(args.words):
        parser.print_help()
        parser.exit()
    own = argparse.ArgumentParser(prog=parser.prog, add_help=False, allow_abbrev=False)
    add_options: Callable[[argparse.ArgumentParser], None] = args.add_options
    add_options(own)
    _, words = own.parse_known_args(args.words, args)
    return words


def _split(names: list[str]) -> tuple[list[str], str | None]:
    """Models, and the config: the word that is, or is called, a YAML file."""
    configs = [name for name in names if name.endswith(_SUFFIXES) and not Path(name).is_dir()]
    if len(configs) > 1:
        raise ValueError(f"one CONFIG, please: {', '.join(configs)}")
    models = [name for name in names if name not in configs]
    twice = next((name for name in models if models.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} is named twice")
    return models, configs[0] if configs else None


def _config_of(sources: list[ModelSource]) -> Path:
    """The config of the run that the models come from."""
    runs = {source.run.path.resolve(): source.run for source in sources if source.run is not None}
    if len(runs) != 1 or not next(iter(runs.values())).config.is_file():
        what = "the models are of several runs" if runs else "no model is of a run"
        raise ValueError(
            f"CONFIG is missing, a YAML file with data and rewards, and {what} whose own could be "
            "taken: rlsys eval MODEL_OR_RUN... CONFIG"
        )
    path = next(iter(runs.values())).config
    schema = schema_of(path)
    if schema is not Config:
        raise ValueError(
            f"{path} is a config of `rlsys {schema.command}`, without prompts and rewards to "
            "evaluate by: name a CONFIG for `rlsys grpo` behind the run: rlsys eval RUN CONFIG"
        )
    print(f"config: {path}")
    return path


def _check(config: Config) -> None:
    if not config.data.has_held_out:
        raise ValueError(
            "there is nothing to evaluate on: set data.val_dataset, data.val_sets or "
            "data.split_dataset_ratio"
        )


def _evaluate(
    args: argparse.Namespace, config: Config, sources: list[ModelSource], models: list[str]
) -> list[Result]:
    """Sample and score with one model after the other; writes the files of each."""
    from rlsys.commands.eval_run import Evaluator  # imports Ray

    server = None
    labels = [source.label for source in sources]
    if args.server is not None:
        from rlsys.engines.chat_server import find_server

        server = find_server(args.server, models[0] if models else None)
        labels = [server.model]
    folders = result_folders(args.out, config, labels)
    with Evaluator(config) as evaluator:
        if server is not None:
            return [evaluator.of_server(server, folders[0])]
        tasks = [evaluator.read(source) for source in sources]  # all mistakes before the first run
        return [evaluator.of_model(*pair) for pair in zip(tasks, folders, strict=True)]
