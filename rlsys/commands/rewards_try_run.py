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

    from rlsys.types import Prompt


@dataclass(slots=True)
class TriedRun:
    """The config beside a file of completions, and what is said about its use."""

    path: Path
    """Of the config."""
    config: Config
    used: list[str] = field(default_factory=list)
    """Lines of what was taken from it."""
    missing: list[str] = field(default_factory=list)
    """Lines of what could not be taken, and why."""

    @property
    def known(self) -> dict[str, Any]:
        """Values of the run for parameters of these names."""
        return self.config.known_to_rewards

    def plugins(self) -> list[str]:
        """Its files that are here."""
        config = self.config
        listed = dict.fromkeys([*config.data.external_plugins, *config.reward.external_plugins])
        here = [path for path in listed if Path(path).expanduser().is_file()]
        self.missing += [f"plugin {path}: not a file here" for path in listed if path not in here]
        if here:
            self.used.append(f"plugins: {', '.join(here)}")
        return here

    def params(self, names: list[str]) -> dict[str, dict[str, Any]]:
        """Its settings of the functions that are tried."""
        found = {n: dict(self.config.reward.params[n]) for n in names if self._has_params(n)}
        self.used += [f"settings of {name}: {settings}" for name, settings in found.items()]
        return found

    def _has_params(self, name: str) -> bool:
        return bool(self.config.reward.params.get(name))

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """That of its model; None where it is not here."""
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
        """Its prompts, as it had them: all with a tokenizer, else those of `wanted`."""
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
                found = self._loaded(tokenizer, evaluated=evaluated)
        except ValueError as error:
            self.missing.append(f"data: {error}")
            return RowSources(tokenizer=tokenizer)
        names = ", ".join(data.val_dataset if held_out else data.dataset)
        if wanted <= found.keys():
            self.used.append(f"data: {names}")
        else:
            unknown = sorted(wanted - found.keys())
            self.missing.append(f"data: {names} gives no prompt {unknown[0]!r} with this config")
            found = {}
        return RowSources(found, tokenizer=tokenizer)

    def _loaded(self, tokenizer: PreTrainedTokenizerBase, *, evaluated: bool) -> dict[str, Prompt]:
        from rlsys.data.load import load_prompts

        data = load_prompts(self.config.data, tokenizer, seed=self.config.seed)
        prompts = data.validation if evaluated else [*data.train, *data.validation]
        return {prompt.prompt_id: prompt for prompt in prompts}


def find_run(completions: Path) -> TriedRun | None:
    """The run that wrote a file of completions; None if there is no config of one beside it.

    Raises:
        ValueError: the config cannot be read any more.
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
