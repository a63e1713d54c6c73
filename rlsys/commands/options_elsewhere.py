"""Options that infer, eval and export do not have: what they are here, or the nearest ones.

Users paste commands of ms-swift, verl and Megatron-LM, as they do behind `rlsys grpo`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterator, Sequence

from rlsys.text import counted

_ADAPTER = (
    "write its value, the folder of the LoRA adapter, in place of the model: it names its base"
)
_QUANTISE = "quantised weights are not written"
_MODEL = "write its value as MODEL_OR_RUN, without an option"
_ENGINE = "leave it out: the engine is always vLLM"

ELSEWHERE: dict[str, dict[str, str]] = {
    "export": {
        **dict.fromkeys(
            ("model", "mcore_model", "load", "hf_model_path", "hf_checkpoint", "input_dir"),
            "write its value as SOURCE, without an option",
        ),
        **dict.fromkeys(
            ("output_dir", "save", "target_dir"), "write its value as OUT, without an option"
        ),
        "local_dir": "name the run, with --step N, as SOURCE",
        "to_mcore": "write --to mcore",
        "to_hf": "write --to hf",
        "adapters": "write its value as SOURCE, and --merge for a model with it merged in",
        **dict.fromkeys(
            ("mcore_adapters", "mcore_adapter"), "adapters are read in PEFT's format: --adapters"
        ),
        **dict.fromkeys(("quant_bits", "quant_method", "quant_n_samples"), _QUANTISE),
        "exist_ok": "write --overwrite",
        **dict.fromkeys(
            (
                *("tensor_model_parallel_size", "pipeline_model_parallel_size"),
                *("expert_model_parallel_size", "context_parallel_size"),
            ),
            "leave it out: what --to mcore writes loads with any parallelism",
        ),
    },
    "infer": {
        **dict.fromkeys(("model", "model_name_or_path", "ckpt_dir"), _MODEL),
        "adapters": _ADAPTER,
        "val_dataset": "write --prompts FILE --out FILE",
        "result_path": "write --out FILE",
        "max_new_tokens": "write --max_tokens",
        "stream": "leave it out: a chat always streams",
        "infer_backend": _ENGINE,
        "torch_dtype": "write --dtype",
        "vllm_tensor_parallel_size": "write --tensor_parallel_size",
        "vllm_gpu_memory_utilization": "write --gpu_memory_utilization",
        "vllm_max_model_len": "write --max_model_len",
        "repetition_penalty": "only a client of --serve can ask for it, in its request",
    },
    "eval": {
        **dict.fromkeys(("model", "model_name_or_path", "ckpt_dir"), _MODEL),
        "adapters": _ADAPTER,
        "eval_dataset": "the data are those of CONFIG: set --data.val_dataset, with rows and "
        "rewards of yours; benchmarks by name are not here",
        "val_dataset": "write --data.val_dataset",
        "eval_limit": "write --data.max_eval_prompts",
        "eval_backend": "leave it out: rlsys scores with the rewards of CONFIG",
        "eval_url": "write --server URL",
        "eval_output_dir": "write --out FOLDER",
        "eval_generation_config": "write --eval.temperature, --eval.top_p and so on",
        "infer_backend": _ENGINE,
        "max_new_tokens": "write --rollout.max_completion_length",
    },
}
"""Command -> name of an option elsewhere -> what to write here."""


def what_to_write_instead(
    command: str, words: Sequence[str], options: Collection[str]
) -> str | None:
    """One message with all words that are not options of `command`; None if it has them all.

    Args:
        command: its name; one that is not in ELSEWHERE has no such message.
        words: behind the command.
        options: the command's own, with their dashes.
    """
    if command not in ELSEWHERE or {"-h", "--help"} & set(words):
        return None
    problems = dict.fromkeys(_problems(command, words, options))
    lines = "".join(f"\n  - {problem}" for problem in problems)
    return (
        f"{counted(len(problems), 'problem')} on the command line:{lines}\n"
        f"`rlsys {command} --help` lists the options"
        if problems
        else None
    )


def _problems(command: str, words: Sequence[str], options: Collection[str]) -> Iterator[str]:
    if not any(map(_is_other(options), words)):
        return  # at once: the fields of the config take megabytes, which an export does not need
    from rlsys.config.pasted_command import split_command

    pasted = split_command(words)
    # A model may be called as a program is; two words, such as `swift export`, are a program.
    is_pasted = len(pasted.program) > 1
    if is_pasted:
        yield f"{' '.join(pasted.program)}: leave it out, `rlsys {command}` is the program"
    for word in pasted.options if is_pasted else words:
        if word == "--vllm_args":  # what follows is vLLM's
            return
        option = word.partition("=")[0]
        if _is_other(options)(word) and (text := _what_to_write(command, option, options)):
            yield f"{option}: {text}"


def _is_other(options: Collection[str]) -> Callable[[str], bool]:
    """Whether a word is an option, and neither one of `options` nor the beginning of one."""

    def is_other(word: str) -> bool:
        option = word.partition("=")[0]
        return option.startswith("--") and not any(own.startswith(option) for own in options)

    return is_other


def _what_to_write(command: str, option: str, options: Collection[str]) -> str:
    name = option.removeprefix("--").replace("-", "_")
    if text := ELSEWHERE[command].get(name):
        return text
    if command == "eval":
        from rlsys.config.fields import config_fields

        # Other words are fields of the config, which its own check knows.
        return f"write --eval.{name}" if f"eval.{name}" in config_fields() else ""
    near = difflib.get_close_matches(f"--{name}", list(options), n=1, cutoff=0.8)
    return "there is no such option" + (f". Did you mean {near[0]}?" if near else "")
