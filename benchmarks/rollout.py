"""Compares the completion tokens a second of the rollout actor and of a bare vLLM script.

    python benchmarks/rollout.py                              # the actor against two bare scripts
    python benchmarks/rollout.py --gpus 2 --what profile --variants default v1_runner
    python benchmarks/rollout.py --what profile --parts floor    # a step next to its floor
    python benchmarks/rollout.py --device cpu --shape tiny    # does it run?

actor: the RolloutActor of a run, in Ray, groups streamed back as they finish. bare: vllm.LLM with
the same arguments and sampling parameters and nothing around it; in a process of its own it keeps
its engine in another one, as vLLM does by itself, bare_in_process does not, as the actor does not.
profile: the actor's engine in one process, step by step; rollout_steps.py says what it measures.

two_engines: two RolloutActors that share the GPU (rollout.engines_per_gpu), with half of the
sequences each.

Each has a process and a GPU of its own, `--gpus` at a time. If one fails or hangs, its entry is
"error". A wave is `num_seqs` completions that begin and end together: random
weights that never sample EOS (random_model.py) make all as long as they may be. The last wave is
twice as many completions as fit at once, of different lengths, as a run has them. max_num_seqs is
that of the largest wave throughout. Prints JSON.
"""

import argparse
import contextlib
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

from alone import run_alone, run_on_gpus
from machine import describe_machine
from random_model import SHAPES, save_random_model
from rollout_steps import PARTS, VARIANTS, VARIED, GivenLengths, length_of, profile

from rlsys.actors.ray_session import ray_session
from rlsys.config import Config
from rlsys.engines.vllm.settings import engine_arguments, rollout_env
from rlsys.model.shape import read_model_shape
from rlsys.types import Prompt, SampleRequest

WAVE = 10_000
"""The tickets of a wave begin at its number times this."""


def main():
    arguments = parse_arguments()
    if arguments.one is not None:
        with contextlib.redirect_stdout(sys.stderr):
            result = WHAT[arguments.one](arguments)
        print(json.dumps(result), flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        save = [*command(arguments), "--model", str(model), "--one", "save"]
        saved = run_alone(save, timeout_s=arguments.timeout_s, gpus=on(0, arguments))
        if "error" in saved:
            sys.exit(f"no model to measure with: {saved['error']}")
        results = run_on_gpus(jobs(arguments, model), num_gpus=arguments.gpus)
    for side in ("actor", "two_engines"):
        for what in ("bare", "bare_in_process"):
            if what in results and side in results:
                results[f"{side} / {what}"] = ratios(results[side], results[what])
    print(
        json.dumps({"machine": describe_machine(), "shape": arguments.shape, **results}, indent=2)
    )


def jobs(arguments, model):
    """{name: function of a GPU} of the jobs that the arguments name."""

    def job(what, variant):
        line = [*command(arguments), "--model", str(model), "--one", what, "--variants", variant]
        return lambda gpu: run_alone(
            line, timeout_s=arguments.timeout_s, gpus=on(gpu, arguments), env=environment(what)
        )

    named = {}
    for what in arguments.what:
        for variant in arguments.variants if what == "profile" else ["default"]:
            named[what if variant == "default" else f"{what} {variant}"] = job(what, variant)
    return named


def command(arguments):
    names = ("shape", "device", "prompt_length", "completion_length", "num_generations", "steps")
    options = [text for name in names for text in (f"--{name}", str(getattr(arguments, name)))]
    options += ["--num_seqs", *map(str, arguments.num_seqs), "--parts", *arguments.parts]
    return [sys.executable, __file__, *options, "--timeout_s", str(arguments.timeout_s)]


def environment(what):
    return {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"} if what == "bare" else {}


def on(gpu, arguments):
    return [gpu] if arguments.device == "cuda" else None


def ratios(actor, bare):
    return {
        wave: actor[wave]["tokens_per_second"] / bare[wave]["tokens_per_second"]
        for wave in actor
        if "wave" in wave and wave in bare
    }


def save(arguments):
    save_random_model(arguments.model, arguments.shape, arguments.device, endless=True)
    return {"saved": str(arguments.model)}


def actor(arguments):
    """Tokens a second of a RolloutActor, or two, with what reads their streams."""
    import rlsys.actors.ray_env  # noqa: F401  # before Ray is imported
    import ray  # isort: skip
    from rlsys.actors import rollout

    class Actor(rollout.RolloutActor):
        def __init__(self, config, device, engine_rank):
            GivenLengths(config.rollout.max_completion_length)
            super().__init__(config, device, engine_rank)

    rollout.RolloutActor = Actor
    num_engines = 2 if arguments.one == "two_engines" else 1
    config = make_config(arguments, num_engines=num_engines)
    gpus = {"num_gpus": 0 if arguments.device == "cpu" else 1 / num_engines, "num_cpus": 0.01}

    def wave(requests):
        engines.submit(requests)
        groups = []
        while len(groups) < len(requests):
            ray.wait(engines.pending_refs(), timeout=60)
            groups += engines.collect()
        return [completion.token_ids for group in groups for completion in group.completions]

    with ray_session(log_to_driver=False):
        engines = rollout.RolloutActors(config, device=arguments.device, place=lambda rank: gpus)
        start_s = max(engines.start())
        return {"start_s": start_s} | waves(wave, arguments)


def bare(arguments):
    """Tokens a second of a script with the same settings."""
    os.environ.update(rollout_env(arguments.device) | environment(arguments.one))
    from vllm import LLM, SamplingParams

    config = make_config(arguments)
    start = time.perf_counter()
    llm = LLM(
        model=str(arguments.model),
        **engine_arguments(
            config, read_model_shape(arguments.model), device=arguments.device, engine_rank=0
        ),
    )
    start_s = time.perf_counter() - start

    def wave(requests):
        outputs = llm.generate(
            [{"prompt_token_ids": request.prompt.token_ids} for request in requests],
            [
                SamplingParams(
                    n=request.num_generations,
                    temperature=request.temperature,
                    seed=request.seed,
                    max_tokens=length_of(request.ticket, arguments.completion_length),
                    logprobs=0,
                    flat_logprobs=True,
                    detokenize=False,
                )
                for request in requests
            ],
            use_tqdm=False,
        )
        return [sampled.token_ids for output in outputs for sampled in output.outputs]

    return {"start_s": start_s} | waves(wave, arguments)


def profiled(arguments):
    os.environ.update(rollout_env(arguments.device))
    (variant,) = arguments.variants
    return profile(
        make_config(arguments),
        variant,
        device=arguments.device,
        waves=lambda wave, graphs: waves(wave, arguments, graphs),
        requests=lambda num_seqs, number: make_requests(num_seqs, number, arguments),
        steps=arguments.steps,
        parts=arguments.parts,
    )


WHAT = {
    "save": save,
    "actor": actor,
    "bare": bare,
    "bare_in_process": bare,
    "profile": profiled,
    "two_engines": actor,
}


def waves(wave, arguments, graphs=None):
    """`wave` takes requests and returns the token ids of all completions."""
    sizes = {f"wave of {num_seqs}": num_seqs for num_seqs in arguments.num_seqs}
    sizes |= {f"varied wave of {2 * max(arguments.num_seqs)}": 2 * max(arguments.num_seqs)}
    wave(make_requests(arguments.num_seqs[0], 0, arguments))  # warm-up
    results = {}
    for number, (name, num_seqs) in enumerate(sizes.items(), 1):
        place = number + (VARIED // WAVE if name.startswith("varied") else 0)
        requests = make_requests(num_seqs, place, arguments)
        if graphs is not None:
            graphs.clear()
        start = time.perf_counter()
        completions = wave(requests)
        seconds = time.perf_counter() - start
        tokens = sum(len(token_ids) for token_ids in completions)
        lengths = [length_of(request.ticket, arguments.completion_length) for request in requests]
        assert tokens == sum(lengths) * arguments.num_generations
        results[name] = {
            "seconds": seconds,
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            **({} if graphs is None else {"graphs": dict(graphs)}),
        }
        print(f"{name}: {tokens / seconds:.0f} tokens/s", file=sys.stderr, flush=True)
    return results


def make_requests(num_seqs, number, arguments):
    """Prompts that no other wave has: none is in the prefix cache."""
    vocabulary = SHAPES[arguments.shape].vocabulary
    requests = []
    for index in range(num_seqs // arguments.num_generations):
        ticket = WAVE * number + index
        draw = random.Random(ticket)
        ids = [draw.randrange(3, vocabulary) for _ in range(arguments.prompt_length)]
        prompt = Prompt(str(ticket), [], ids)
        requests.append(SampleRequest(ticket, prompt, arguments.num_generations, 1.0, seed=ticket))
    return requests


def make_config(arguments, *, num_engines=1):
    largest = max(arguments.num_seqs)
    rollout = {
        "generation_batch_size": largest,
        "num_generations": arguments.num_generations,
        "max_completion_length": arguments.completion_length,
        "max_num_seqs": largest // num_engines,
        "num_engines": num_engines,
        "engines_per_gpu": num_engines,
    }
    return Config.model_validate(
        {
            "output_dir": "unused",
            "max_steps": 1,
            "device": arguments.device,
            "data": {"dataset": ["unused"], "max_prompt_length": arguments.prompt_length},
            "model": {"path": str(arguments.model)},
            "reward": {"reward_funcs": ["format"]},
            "rollout": rollout,
        }
    )


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-1.5b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--num_seqs", type=int, nargs="+", help="of each wave")
    parser.add_argument("--prompt_length", type=int, default=128, help="tokens")
    parser.add_argument("--completion_length", type=int, help="tokens")
    parser.add_argument("--num_generations", type=int, default=8)
    parser.add_argument("--steps", type=int, help="that a part of a profile looks at")
    parser.add_argument(
        "--what",
        nargs="+",
        choices=[what for what in WHAT if what != "save"],
        default=["actor", "bare", "bare_in_process"],
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["default"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="of a profile")
    parser.add_argument("--gpus", type=int, default=1, help="processes at a time, a GPU each")
    parser.add_argument("--timeout_s", type=float, default=240, help="of each process")
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--one", choices=WHAT, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    on_gpu = arguments.device == "cuda"
    arguments.num_seqs = arguments.num_seqs or ([128, 512, 1024] if on_gpu else [16, 32])
    arguments.completion_length = arguments.completion_length or (512 if on_gpu else 32)
    arguments.steps = arguments.steps or (60 if on_gpu else 5)
    return arguments


if __name__ == "__main__":
    main()
