"""`rlsys data preview`: print what a run would train on."""

from __future__ import annotations

import argparse
import math
import re
import reprlib
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from rlsys.commands.console import make_console
from rlsys.commands.data_preview_samples import preview_preferences, preview_samples
from rlsys.commands.data_preview_scored import preview_scored
from rlsys.commands.data_preview_tables import (
    first_of_each_stream,
    print_counts,
    print_histogram,
    print_table,
    spread,
)
from rlsys.config import Config, PreferenceConfig, RewardModelConfig, RunConfig, SftConfig
from rlsys.config.load import load_config, load_config_as
from rlsys.config.method import schema_of
from rlsys.data.preferences import load_preferences
from rlsys.data.samples import SampleRules, load_samples
from rlsys.data.scored import load_scored
from rlsys.data.scored_rows import ScoreRules
from rlsys.data.sources import MAX_PROBLEMS_SHOWN
from rlsys.model.chat_template import TEMPLATE_COLUMNS
from rlsys.model.classifier import pad_token_id
from rlsys.model.detokenize import Detokenizer
from rlsys.model.folder import find_model_folder, tokenizer_source
from rlsys.model.raw_text import RawText
from rlsys.model.shape import read_model_shape
from rlsys.model.stop_tokens import read_stop_rules
from rlsys.preflight.before_start import load_checked_prompts
from rlsys.preflight.hub import use_cache_without_hub
from rlsys.preflight.positions import within_positions
from rlsys.preflight.rewards import reachable_rewards
from rlsys.preflight.turn_ends import turn_end_note
from rlsys.rewards.columns import column_problems, column_uses, row_check, unread_columns
from rlsys.rewards.reachable import (
    GOLD_REMEDY,
    Look,
    ReachableRewards,
    is_users_class,
    look_at_rows,
)
from rlsys.text import counted
from rlsys.tracking.printable import printable
from rlsys.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def main(args: argparse.Namespace) -> bool:
    """Show the data of a config; returns whether it can be trained on."""
    rows, overrides = split_rows_option(args.overrides)
    num_rows = args.rows if rows is None else rows
    schema = schema_of(args.config, overrides)
    if issubclass(schema, SftConfig):  # distillation, too
        resolved = within_positions(load_config_as(schema, args.config, overrides))
        return _preview_samples(resolved.config, make_console(), num_rows=num_rows)
    if schema is PreferenceConfig:
        pairs = within_positions(load_config_as(PreferenceConfig, args.config, overrides))
        return _preview_preferences(pairs.config, make_console(), num_rows=num_rows)
    if schema is RewardModelConfig:
        scored = within_positions(load_config_as(RewardModelConfig, args.config, overrides))
        return _preview_scored(scored.config, make_console(), num_rows=num_rows)
    config = load_config(args.config, overrides).config
    return preview(config, make_console(), num_rows=num_rows)


def _preview_samples(config: SftConfig, console: Console, *, num_rows: int) -> bool:
    """`preview` of a config for supervised training."""
    use_cache_without_hub(config)
    tokenizer, folder = load_tokenizer(config), find_model_folder(config.model.path)
    shape = read_model_shape(folder, may_bridge=True)
    rules, seed = SampleRules.of(config), config.seed
    data = load_samples(config.data, tokenizer, rules, seed=seed, vocab_size=shape.vocab_size)
    preview_samples(config.data, data, tokenizer, console, num_rows=num_rows)
    _print_note(turn_end_note(folder, tokenizer, data.some), console)
    return True


def _print_note(note: str | None, console: Console) -> None:
    if note is not None:
        console.print(Text(f"\nNote: {note}", style="yellow"))


def _preview_preferences(config: PreferenceConfig, console: Console, *, num_rows: int) -> bool:
    """`preview` of a config for preference training."""
    use_cache_without_hub(config)
    tokenizer, folder = load_tokenizer(config), find_model_folder(config.model.path)
    data = load_preferences(
        config.data,
        tokenizer,
        is_paired=config.preference.is_paired,
        seed=config.seed,
        vocab_size=read_model_shape(folder, may_bridge=True).vocab_size,
    )
    preview_preferences(config.data, data, tokenizer, console, num_rows=num_rows)
    answers = [row.answers[0] for row in data.some]
    _print_note(turn_end_note(folder, tokenizer, answers), console)
    return True


def _preview_scored(config: RewardModelConfig, console: Console, *, num_rows: int) -> bool:
    """`preview` of a config for a score head."""
    use_cache_without_hub(config)
    tokenizer, folder = load_tokenizer(config), find_model_folder(config.model.path)
    shape = read_model_shape(folder, may_bridge=True, num_labels=config.num_labels)
    data = load_scored(
        config.data,
        tokenizer,
        ScoreRules.of(config),
        seed=config.seed,
        pad_token_id=pad_token_id(tokenizer),
        vocab_size=shape.vocab_size,
    )
    preview_scored(config, data, tokenizer, console, num_rows=num_rows)
    return True


def preview(config: Config, console: Console, *, num_rows: int) -> bool:
    """Print what became of the rows, the columns, the lengths, and `num_rows` rendered prompts.

    Returns:
        whether the reward functions find the columns and values that they need.

    Raises:
        ValueError: the data cannot be used, or the model has no tokenizer here.
    """
    use_cache_without_hub(config)
    tokenizer = load_tokenizer(config)
    data = load_checked_prompts(config, tokenizer)
    prompts = first_of_each_stream(data) if config.data.streaming else data.train
    print_counts(config.data, data, console)
    problems = _print_columns(config, prompts, console)
    lengths = [length for count in data.counts for length in count.lengths.elements()]
    if config.data.streaming:
        lengths = [len(prompt.token_ids) for prompt in prompts]
    low, high = config.data.min_prompt_length, config.data.max_prompt_length
    print_histogram("Prompt", lengths, "data.max_prompt_length", low, high, console)
    _print_special_tokens(config, tokenizer, console)
    rewards = None if problems else reachable_rewards(config, tokenizer)
    for prompt in spread(prompts, data.train_sizes, num_rows):
        _print_prompt(prompt, tokenizer, console)
        if rewards is not None:
            _print_right_answers(rewards.look(prompt), console)
    if rewards is not None:
        if data.refused and not config.data.streaming:  # such rows are problems already
            reward = config.reward
            check = row_check(reward.names_that_check_rows, reward.params, config.run_values)
            prompts = [prompt for prompt in prompts if not check(prompt.columns)]
        problems += _right_answers_of_all(rewards, prompts, config, console)
    problems += [problem.text for problem in data.refused[:MAX_PROBLEMS_SHOWN]]
    if len(data.refused) > MAX_PROBLEMS_SHOWN:
        problems.append(f"... and {len(data.refused) - MAX_PROBLEMS_SHOWN:,} more such rows")
    detokenizer = Detokenizer(tokenizer, config.rollout.skip_special_tokens)
    for notice in [*data.notices, *filter(None, [detokenizer.note()])]:
        console.print(Text(f"\nNote: {notice}", style="yellow"))
    for problem in problems:
        console.print(Text(f"\nProblem: {problem}", style="bold red"))
    return not problems


def split_rows_option(words: list[str]) -> tuple[int | None, list[str]]:
    """Split `--rows N` off the overrides of a config.

    Raises:
        ValueError: N is not a number.
    """
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == "--rows":
            value, end = (value, 1) if equals else ("".join(words[index + 1 : index + 2]), 2)
            if not value.isdecimal():
                raise ValueError(f"--rows takes a number, not {value!r}")
            return int(value), words[:index] + words[index + end :]
    return None, words


def load_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the model.

    Raises:
        ValueError: the model is not here, or does not have a tokenizer.
    """
    from transformers import AutoTokenizer

    find_model_folder(config.model.path)
    try:
        return AutoTokenizer.from_pretrained(
            tokenizer_source(config.model.path), trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"model.path: {config.model.path} has no tokenizer: {error}") from error


# --- columns -------------------------------------------------------------------------------------


def _print_columns(config: Config, prompts: list[Prompt], console: Console) -> list[str]:
    """Print the columns; returns what is wrong with them."""
    names = list(prompts[0].columns) if prompts else []
    uses = column_uses(config)
    rows = []
    for column in names:
        values = [prompt.columns.get(column) for prompt in prompts]
        there = [value for value in values if value is not None]
        users = ["chat template"] if column in TEMPLATE_COLUMNS else []
        users += [n for n, use in uses.items() if column in (*use.needed, *use.optional)]
        rows.append(
            [
                column,
                "/".join(sorted({type(value).__name__ for value in there})) or "-",
                f"{len(values) - len(there):,}",
                _short(there[0]) if there else "",
                ", ".join(users),
            ]
        )
    console.print()
    if names:
        print_table(
            console,
            "Columns for the rewards",
            ("column", "type", "MISSING", "example", "used by"),
            rows,
        )
    else:
        console.print("The rows have no columns besides the prompt.")
    for name, use in uses.items():
        if use.takes_all and not use.needed and not use.optional:
            line = f"The reward `{name}` names no column and gets all of them."
            console.print(Text(line, style="dim"))
    unread = unread_columns(config, names)
    if unread is not None:
        console.print(Text(f"{unread[0].upper()}{unread[1:]}.", style="dim"))
    return column_problems(config, names)


def _short(value: Any) -> str:
    shortener = reprlib.Repr()
    shortener.maxstring = shortener.maxother = 40
    return printable(shortener.repr(value)).replace("\n", " ")


# --- special tokens ------------------------------------------------------------------------------


def _print_special_tokens(
    config: Config, tokenizer: PreTrainedTokenizerBase, console: Console
) -> None:
    """Print what writes prompts, what stands before them, and what ends completions."""
    raw = RawText.of(tokenizer)
    by_template = config.data.prompt_template is None and tokenizer.chat_template is not None
    begin = f"; {_names(raw.before, tokenizer)} stands before them" if raw.before else ""
    lines = [f"Prompts are plain text, without a chat template{begin}."]
    if by_template:
        lines = ["The chat template writes prompts, with all their special tokens."]
    elif raw.after:
        after = _names(raw.after, tokenizer)
        lines.append(f"The tokenizer would end texts with {after}: prompts do not get it.")
    stops = read_stop_rules(find_model_folder(config.model.path), tokenizer, config.rollout)
    ends = [_names(stops.token_ids, tokenizer)] if stops.token_ids else []
    ends += map(repr, stops.texts)
    lines.append(f"Completions end with {' or '.join(ends)}.")
    console.print()
    for line in lines:
        console.print(Text(printable(line)))


def _names(token_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return ", ".join(f"{tokenizer.convert_ids_to_tokens(i)} (id {i})" for i in token_ids)


# --- prompts -------------------------------------------------------------------------------------


def _print_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
    console.print()
    length = counted(len(prompt.token_ids), "token")
    console.print(Text.assemble((prompt.prompt_id, "bold"), f"  {length}"))
    decoded: Any = tokenizer.decode(prompt.token_ids, skip_special_tokens=False)
    text = Text(printable(decoded))
    special = sorted(map(str, tokenizer.get_added_vocab()), key=len, reverse=True)
    if special:
        text.highlight_regex("|".join(map(re.escape, special)), style="bold cyan")
    console.print(text)
    console.print()
    for name, value in prompt.columns.items():
        console.print(Text.assemble((f"  {name}: ", "dim"), _short(value)), no_wrap=True)


# --- right answers -------------------------------------------------------------------------------


def _print_right_answers(look: Look, console: Console) -> None:
    """Print the right answer that each function reads, and a completion that earns the most."""
    for name, gold in look.golds.items():
        if gold is None:
            words = f"  {name} reads no right answer in this row"
            console.print(Text(words, style="yellow"))
        else:
            console.print(Text.assemble((f"  {name} reads: ", "dim"), printable(gold)))
    if look.completion is not None:
        values = ", ".join(f"{name} {_value(value)}" for name, value in look.values.items())
        console.print(Text.assemble(("  a completion that earns ", "dim"), values))
        for line in printable(look.completion).splitlines():
            console.print(Text(f"    {line}", style="green"))
    for name in look.missed:
        best = look.best[name]
        says = f"earns {best:.4g}, below its maximum, on the best completion tried"
        if math.isnan(best):
            says = "gives None for every completion tried"
        console.print(Text(f"  {name} {says}", style="bold red"))


def _right_answers_of_all(
    rewards: ReachableRewards, prompts: list[Prompt], config: Config, console: Console
) -> list[str]:
    """Print problems of right answers in some rows; returns the problems in every row."""
    if rewards.unknown:
        names = ", ".join(rewards.unknown)
        own = [name for name in rewards.unknown if is_users_class(name)]
        remedy = "plugins/README.md has a class with both"
        says = f". Give {', '.join(own)} max_reward and gold(row): {remedy}" if own else ""
        console.print(Text(f"\nBest value not known, so not checked: {names}{says}", style="dim"))
    problems = []
    for finding in look_at_rows(rewards, prompts):
        if finding.in_all_rows and finding.name in config.reward.names_that_check_rows:
            remedy = f". {GOLD_REMEDY}" if finding.kills_reward else ""
            problems.append(f"{finding.text}{remedy}")
        else:
            console.print(Text(f"\nNote: {finding.text}", style="yellow"))
    return problems


def _value(value: float) -> str:
    return "None" if math.isnan(value) else f"{value:.4g}"
