"""What `rlsys rewards try` takes from a run whose completions it scores: its saved config."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsys.commands.rewards_try_rows import RowSources, prompts_of
from rlsys.config import Config
from rlsys.config.load import is_saved_config, load_config
from rlsys.data.sources import Split
from rlsys.problems import ProblemsError
from rlsys.run.folder import RunDir

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(slots=True)
class TriedRun:
    """The run that wrote a file of completions, and what was taken from it."""

    path: Path
    """Its saved config."""
    config: Config
    used: list[str] = field(default_factory=list)
    """Lines that say what was taken."""
    missing: list[str] = field(default_factory=list)
    """Lines that say what could not be taken, and why."""

    def plugins(self) -> list[str]:
        """Its plugin files that exist here."""
        config = self.config
        listed = dict.fromkeys([*config.data.external_plugins, *config.reward.external_plugins])
        here = [path for path in listed if Path(path).expanduser().is_file()]
        self.missing += [f"plugin {path}: not a file here" for path in listed if path not in here]
        if here:
            self.used.append(f"plugins: {', '.join(here)}")
        return here

    def params(self, names: list[str]) -> dict[str, dict[str, Any]]:
        """Its settings for the functions `names`."""
        params = self.config.reward.params
        found = {name: dict(params[name]) for name in names if params.get(name)}
        self.used += [f"settings of {name}: {settings}" for name, settings in found.items()]
        return found

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Its model's tokenizer; None if that is not here."""
        from rlsys.commands.data_preview import load_tokenizer

        try:
            tokenizer = load_tokenizer(self.config)
        except ValueError as error:
            self.missing.append(f"tokenizer: {str(error).splitlines()[0]}")
            return None
        self.used.append(f"tokenizer: {self.config.model.path}")
        return tokenizer

    def sources(
        self, completions: Path, wanted: set[str], tokenizer: PreTrainedTokenizerBase | None
    ) -> RowSources:
        """Its prompts: all that it had, with a tokenizer; else those with the ids `wanted`."""
        data = self.config.data
        evaluated = completions.name == RunDir(completions.parent).eval_completions.name
        held_out = evaluated and bool(data.val_dataset)
        try:
            if tokenizer is None or data.streaming:
                split: Split = "validation" if held_out else "train"
                originals = {name.partition("+")[0] for name in wanted}
                found = prompts_of(data, split, originals)
                found |= {n: found[o] for n in wanted if (o := n.partition("+")[0]) in found}
            else:
                from rlsys.data.load import load_prompts

                loaded = load_prompts(data, tokenizer, seed=self.config.seed)
                own = loaded.held_out if evaluated else [*loaded.train, *loaded.held_out]
                found = {prompt.prompt_id: prompt for prompt in own}
        except ValueError as error:
            self.missing.append(f"data: {error}")
            return RowSources(tokenizer=tokenizer)
        names = ", ".join(data.val_dataset if held_out else data.all_datasets)
        if wanted <= found.keys():
            self.used.append(f"data: {names}")
        else:
            unknown = sorted(wanted - found.keys())
            self.missing.append(f"data: {names} gives no prompt {unknown[0]!r} with this config")
            found = {}
        return RowSources(found, tokenizer=tokenizer)


def find_run(completions: Path) -> TriedRun | None:
    """The run that wrote a file of completions; None without a saved config beside the file.

    Raises:
        ValueError: this version of rlsys cannot read the config.
    """
    path = RunDir(completions.parent).config
    if not path.is_file() or not is_saved_config(path):
        return None
    try:
        return TriedRun(path, load_config(path).config)
    except ProblemsError as error:
        raise ValueError(
            f"{path}, beside the completions, is of another version of rlsys: {error}\nMend or "
            "move it, and name --dataset, --plugin and --params yourself"
        ) from None
