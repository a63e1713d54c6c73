"""Where rows come from: the section `data`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from rlsys.config.field_types import PathText, split_list
from rlsys.config.prompt_template import template_columns
from rlsys.config.schema.section import Section


class RowsConfig(Section):
    """Where rows come from, and how they are read: what `data` has for every method."""

    dataset: list[PathText] = Field(min_length=1)
    """Training rows: files (JSONL, JSON, CSV, TSV, each also compressed, Parquet, Arrow), folders
    or hub ids, written `PATH_OR_ID[:SUBSET[:SPLIT]][#ROWS]`, see docs/data.md. Relative paths start
    at the working directory."""
    dataset_weights: list[PositiveFloat] | None = None
    """One weight per dataset: each prompt or sample comes from a dataset drawn with probability
    weight / sum of weights. null: every row of every dataset comes once an epoch."""
    val_dataset: list[PathText] = []
    """Held-out rows, evaluated every `eval_steps`. Empty: `split_dataset_ratio` of `dataset`."""
    val_sets: dict[str, list[PathText]] = {}
    """Further held-out sets by name, `{math500: math500.jsonl, aime: [a.jsonl, b.jsonl]}`: each is
    evaluated on its own, as eval/NAME/..."""
    split_dataset_ratio: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of `dataset` held out for evaluation, instead of `val_dataset`; 0 holds out nothing."""
    columns: dict[str, str] = {}
    """New names of columns, `{question: prompt}`, given before anything else reads a row."""
    preprocessor: list[str] = []
    """Names of `@register_preprocessor` functions: one for all datasets, or one for each of
    `dataset` (`none` leaves rows as they are)."""
    val_preprocessor: list[str] = []
    """The same for `val_dataset`. Empty: `preprocessor`, if it names one for all. `val_sets` take
    one name for all."""
    external_plugins: list[PathText] = []
    """Python files that register preprocessors, datasets or reward functions. Each may stand here
    or in reward.external_plugins."""
    deduplicate: bool = False
    """Keep the first training row of each rendered text; the others are counted."""
    max_row_mb: PositiveInt = 8
    """Largest row of a text file, in MiB; a larger row is an error, often a missing line break."""
    prompt_template: str | None = None
    """A text with names of columns in braces, `"Question: {question}\\nAnswer:"`, which makes each
    prompt instead of the chat template: for base models. `"{prompt}"` is the bare column. null: the
    model's chat template; without one, rows need a column `prompt` with a text, taken as it is."""
    system: str | None = None
    """System message for rows without one; null adds none."""
    chat_template_kwargs: dict[str, Any] = {}
    """Variables for the chat template, `{enable_thinking: false}` for Qwen3. A row's own column
    `chat_template_kwargs` wins."""
    shuffle: bool = True
    """Shuffle the training rows in every epoch, by `seed`."""
    streaming: bool = False
    """Read and render training rows when they are needed, for data that does not fit in memory.
    Rows are then checked as they come, not before the run."""
    shuffle_buffer_size: PositiveInt = 10_000
    """Rows among which a streamed dataset is shuffled."""

    @field_validator("prompt_template")
    @classmethod
    def _names_columns(cls, template: str | None) -> str | None:
        if template is not None:
            template_columns(template)
        return template

    @field_validator("val_sets", mode="before")
    @classmethod
    def _one_path_is_a_list(cls, sets: Any) -> Any:
        """Read `{math500: a.jsonl}` as `{math500: [a.jsonl]}`."""
        if not isinstance(sets, dict):
            return sets
        return {
            name: split_list(paths) if isinstance(paths, str) else paths
            for name, paths in sets.items()
        }

    @property
    def all_datasets(self) -> list[str]:
        """Every entry of `dataset`, `val_dataset` and `val_sets`."""
        return [*self.dataset, *self.val_dataset, *(p for s in self.val_sets.values() for p in s)]

    @property
    def has_held_out(self) -> bool:
        """Whether any rows are held out for evaluation."""
        return bool(self.val_dataset or self.val_sets or self.split_dataset_ratio)

    @field_validator("chat_template_kwargs")
    @classmethod
    def _no_text_for_a_boolean(cls, variables: dict[str, Any]) -> dict[str, Any]:
        """Refuse "no" for a variable: templates ask `if enable_thinking`, and a text is true."""
        for name, value in variables.items():
            if isinstance(value, str) and value.lower() in ("yes", "no", "on", "off"):
                raise ValueError(f"{name}: {value} is a text, write true or false")
        return variables


class DataConfig(RowsConfig):
    """Where prompts come from."""

    max_eval_prompts: PositiveInt = 256
    """Held-out prompts to evaluate on, in each set; the first ones are taken."""
    max_prompt_length: PositiveInt = 512
    """Longest rendered prompt, in tokens; see `overlong_prompts`."""
    min_prompt_length: PositiveInt = 1
    """Shortest rendered prompt, in tokens; shorter ones are dropped and counted."""
    overlong_prompts: Literal["drop", "error"] = "drop"
    """Whether prompts over `max_prompt_length` are dropped and counted, or stop the run before
    training."""
    difficulty_sampling: bool = False
    """Skip prompts that teach nothing, because all completions of a group got the same reward."""
    difficulty_patience: PositiveInt = 2
    """Groups with equal rewards in a row after which a prompt is skipped."""
    difficulty_exploration: float = Field(default=0.1, gt=0.0, le=1.0)
    """Probability of sampling a prompt that is to be skipped; one group with different rewards
    brings it back."""
