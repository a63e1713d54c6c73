"""Write docs/migration.md, other projects' names, from rlsys/config/names_elsewhere.txt.

python scripts/migration_docs.py
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from rlsys.config import (
    Config,
    DistillConfig,
    PreferenceConfig,
    RewardModelConfig,
    RunConfig,
    SftConfig,
)
from rlsys.config.elsewhere import Counterpart, own_counterparts, projects, show_defaults

TARGET = Path(__file__).parents[1] / "docs" / "migration.md"
_HEAD = """# Coming from TRL, ms-swift, verl, OpenRLHF or slime

Their settings and the fields of rlsys. `rlsys grpo` and `rlsys sft` give the same answers for names
that they do not know, so you can paste a whole command line of another project behind them.
[config.md](config.md) explains every field, [algorithm.md](algorithm.md#recipes) has the algorithms
by name.

Three things differ everywhere:

- **A step** of `rlsys grpo` is one rollout: sample, score, update, sync weights.
  `rollout.generation_batch_size` is its completions, `policy.global_batch_size` the completions of
  one optimizer step. Neither counts prompts. A step of `rlsys sft`, `rlsys preference` and
  `rlsys reward-model` is one optimizer step with `policy.global_batch_size` samples or pairs, as
  elsewhere.
- **GPUs**: policy and rollout engines have GPUs of their own, or share them by turns where there
  are too few (`placement`). `policy.world_size` and `rollout.num_engines` count both.
- **Sampling settings** come from the config only, never from a model's generation_config.json.

Commands; for those beside training see [eval.md](eval.md). MODEL may be a run:

| elsewhere | here |
| --- | --- |
| `swift sft`, `megatron sft`, `trl sft` | `rlsys sft CONFIG` |
| `swift pt`, `megatron pt` | `rlsys sft CONFIG` with `sft.objective: pretrain` |
| `swift rlhf --rlhf_type grpo`, `megatron rlhf`, `trl grpo` | `rlsys grpo CONFIG` |
| `swift rlhf --rlhf_type dpo` (kto, cpo, ...), `trl dpo`, `trl kto` | `rlsys preference CONFIG` |
| `swift rlhf --rlhf_type rm`, `trl reward` | `rlsys reward-model CONFIG` |
| `swift sft --task_type seq_cls` | `rlsys reward-model CONFIG` with `problem_type` |
| `swift rlhf --rlhf_type gkd`, `trl`'s `GKDTrainer` | `rlsys distill CONFIG` |
| `swift infer`, `transformers chat` | `rlsys infer MODEL` |
| `swift infer --val_dataset`, `main_generation` | `rlsys infer MODEL --prompts FILE --out FILE` |
| `swift deploy`, `vllm serve` | `rlsys infer MODEL --serve` |
| `swift eval`, `main_eval`, `trainer.val_only` (verl) | `rlsys eval MODEL CONFIG` |

A whole command of ms-swift can be pasted behind `rlsys export`, `infer` and `eval` too, such as
`rlsys export swift export --model DIR --to_mcore true`: nothing runs, and the answer says for each
option what to write here.

`python scripts/migration_docs.py` writes this page from `rlsys/config/names_elsewhere.txt`.
"""

_COMMANDS = (
    (
        "`swift export --model DIR --to_mcore true --output_dir OUT`",
        "`rlsys export DIR --to mcore OUT`",
    ),
    (
        "`swift export --mcore_model DIR --to_hf true --output_dir OUT`, `megatron export`",
        "`rlsys export DIR --to hf OUT`, of folders that `--to mcore` wrote",
    ),
    (
        "`--test_convert_precision true`, `--torch_dtype`, `--max_shard_size` of `swift export`",
        "the same, and `--per_layer`",
    ),
    (
        "`swift export --adapters DIR --merge_lora true`",
        "`rlsys export DIR --merge --to hf OUT`; `--merge_lora` means the same",
    ),
    (
        "`python -m verl.model_merger merge --backend megatron --local_dir DIR --target_dir OUT`",
        "not needed: each `checkpoints/step-N` is a Hugging Face folder. `rlsys export RUN --step "
        "N --to hf OUT` leaves the optimizer out",
    ),
    (
        "slime's `tools/convert_hf_to_torch_dist.py` and `convert_torch_dist_to_hf.py`",
        "`rlsys export DIR --to mcore OUT` and `--to hf OUT`",
    ),
)
"""Commands of other projects for models and checkpoints, and ours."""


_OTHERS = """These are {about}. All other names mean what the table above says, where its field
is one of `rlsys {command}`.
"""


def markdown() -> str:
    """The whole page."""
    parts = [_HEAD, "## Models and checkpoints\n\n[export.md](export.md) says more.\n"]
    parts.append(_table(("there", "here"), _COMMANDS))
    further: tuple[type[RunConfig], ...] = (
        SftConfig,
        PreferenceConfig,
        RewardModelConfig,
        DistillConfig,
    )
    for project, about in projects(Config).items():
        parts.append(f"## {project}\n\n{about[0].upper()}{about[1:]}.\n")
        parts += _names(Config, project, project)
        for schema in further:
            if (about := projects(schema).get(project)) is not None:
                command = schema.command
                parts += _names(schema, project, f"{project} for `rlsys {command}`")
                parts.append(_OTHERS.format(about=about, command=command))
    return "\n".join(parts)


def _names(schema: type[RunConfig], project: str, label: str) -> Iterator[str]:
    """What differs for a config, and then all names of its own table."""
    rows = [row for row in own_counterparts(schema) if row.project == project]
    differing = [row for row in rows if not row.same_default]
    if differing:
        yield f"### Defaults that differ from {label}\n"
        head = ("field", "default here", f"in {project}")
        yield _table(head, (_differing(row, schema) for row in differing))
    yield f"### Names of {label}\n"
    yield _table((f"in {project}", "here", "note"), map(_named, rows))


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def _differing(row: Counterpart, schema: type[RunConfig]) -> tuple[str, ...]:
    fields = ", ".join(f"`{field}`" for field in row.fields)
    return fields, f"`{show_defaults(row.fields, schema)}`", f"`{row.names[0]}`: `{row.default}`"


def _named(row: Counterpart) -> tuple[str, ...]:
    names = ", ".join(f"`{name}`" for name in row.names)
    if row.fields:
        return names, ", ".join(f"`{field}`" for field in row.fields), row.note
    return names, "not needed" if row.supported else "**not supported**", row.note


if __name__ == "__main__":
    TARGET.write_text(markdown(), encoding="utf-8")
