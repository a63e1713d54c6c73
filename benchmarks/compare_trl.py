"""Times whole GRPO steps of TRL's GRPOTrainer and of rlsys on the same GPUs. Prints JSON.

    python benchmarks/compare_trl.py                    # 32 prompts x 8, 512 tokens, 1.5B shape
    python benchmarks/compare_trl.py --rollout.num_engines 2 --rollout.engines_per_gpu 2
    python benchmarks/compare_trl.py --gpus 1 --prompts 64 --steps 2 --timeout_s 225
    python benchmarks/compare_trl.py --what trl rlsys rlsys_ahead
    python benchmarks/compare_trl.py --device cpu --shape tiny --prompts 4 --completion_length 16

One after the other, each with its own processes and a deadline. Both get the same model folder
(random weights that never sample EOS), prompts, batch, completion length, learning rate, loss
(dapo, beta 0, one optimizer step a rollout) and bfloat16 weights, and no recompute of activations.
On two GPUs TRL runs as its documentation says: `trl vllm-serve` on one, the trainer on the other;
rlsys has the policy on one and engines on the other, and rlsys_ahead samples one step ahead
(`rollout.max_staleness: 1`). On one GPU TRL has vLLM in the trainer's process (its colocate mode,
with --trl_sleep 1 asleep during updates) and rlsys `placement: colocated`.

Options that would only slow TRL are off: logging, gradient checkpointing (its default),
the importance-sampling correction, which costs a forward pass and rlsys does not do at staleness 0
either. Its weights and optimizer state are bfloat16; rlsys keeps both in float32 besides. Its
reward function costs nothing. Attention is torch's scaled_dot_product_attention: flash-attn, if
installed, is `--trl_attention flash_attention_2`. Any further option is one of `rlsys grpo`.

A step lasts from the end of the step before to its own end. TRL's rollout is the preparation of a
batch without its weight sync, its update is the rest. On one GPU the phases of rlsys run once more
alone, and a step is compared with their sum. With --device cpu, TRL samples with transformers, and
two GPUs are Ray's bookkeeping: that only shows that the script works.
"""

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from urllib.request import urlopen

import psutil
from alone import results_only, run_alone
from machine import describe_machine
from random_model import SHAPES, save_random_model

from rlsys.files import replacing


def main():
    arguments = parse_arguments()
    if arguments.one is not None:
        with results_only() as arguments.tell:
            arguments.tell(WHAT[arguments.one](arguments))
        return
    gpus = list(range(arguments.gpus)) if arguments.device == "cuda" else None
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        arguments.folder = Path(folder)
        for what in ("save", *arguments.what):
            results[what] = run_alone(
                command(arguments, what), timeout_s=arguments.timeout_s, gpus=gpus
            )
            print(f"{what}: {json.dumps(results[what])}", file=sys.stderr, flush=True)
            if arguments.out:
                write_report(arguments, results)
    write_report(arguments, results)


def write_report(arguments, results):
    """The results so far to --out, or stdout, with how much faster rlsys is."""
    measured = {side: results[side] for side in SIDES if "step_s" in results.get(side, {})}
    trl = measured.pop("trl", None)
    ratios = {
        f"{side} over trl": {
            "steps a second": trl["step_s"] / own["step_s"],
            "completion tokens a second": own["completion_tokens_per_second"]
            / trl["completion_tokens_per_second"],
        }
        for side, own in measured.items()
        if trl is not None
    }
    asked = {name: getattr(arguments, name) for name in (*SHARED, "rlsys_options")}
    report = {"machine": describe_machine(), "settings": asked, **results, **ratios}
    text = json.dumps(report, indent=2)
    if arguments.out is None:
        print(text)
        return
    with replacing(arguments.out) as file:
        file.write_text(text + "\n")


SIDES = ("trl", "rlsys", "rlsys_ahead")
SHARED = (
    "shape",
    "device",
    "gpus",
    "prompts",
    "generations",
    "completion_length",
    "steps",
    "warm_up",
    "trl_batch_size",
    "trl_attention",
    "trl_sleep",
    "trl_gpu_memory_utilization",
    "timeout_s",
)


def command(arguments, what):
    options = [text for name in SHARED for text in (f"--{name}", str(getattr(arguments, name)))]
    folder = ["--folder", str(arguments.folder)]
    own = arguments.rlsys_options
    return [sys.executable, __file__, *options, *folder, *own, "--one", what]


def save(arguments):
    """Write the model and the data of `rlsys grpo`; TRL reads the same prompts."""
    from grpo_run import write_config

    model = arguments.folder / "model"
    save_random_model(model, arguments.shape, arguments.device, endless=True)
    write_config(
        arguments.folder,
        model=model,
        device=arguments.device,
        steps=arguments.warm_up + arguments.steps,
        prompts=arguments.prompts,
        generations=arguments.generations,
        completion_length=arguments.completion_length,
        gpus=arguments.gpus,
    )
    return {"saved": str(model)}


def rlsys(arguments):
    from grpo_run import run_steps

    options = list(arguments.rlsys_options)
    if arguments.one == "rlsys_ahead":
        options += ["--rollout.max_staleness", "1"]
    config = arguments.folder / "config.yaml"
    return run_steps(
        config,
        options,
        warm_up=arguments.warm_up,
        report=arguments.tell,
        alone=arguments.gpus == 1,
    )


def trl(arguments):
    """Run TRL's trainer, another process, on the first GPU; its server, if any, on the second."""
    from gpu_watch import watched_gpus

    line = command(arguments, "trainer")
    with contextlib.ExitStack() as stack:
        gpus = stack.enter_context(watched_gpus(arguments.device))
        if arguments.device == "cuda" and arguments.gpus == 2:
            port, group_port = free_ports(2)
            server = start_server(arguments, port)
            # The engine is another process of this session, which is killed as a whole.
            stack.callback(server.wait)
            stack.callback(server.kill)
            line += ["--port", str(port), "--group_port", str(group_port)]
            line += ["--server_pid", str(server.pid)]
        result = run_alone(
            line,
            timeout_s=arguments.timeout_s - 10,
            env=TRL_ENV,
            gpus=[0] if arguments.device == "cuda" else None,
        )
        if moments := result.pop("measured_between", None):
            result |= gpus.between(*moments)
        return result


TRL_ENV = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}


def start_server(arguments, port):
    second = os.environ["CUDA_VISIBLE_DEVICES"].split(",")[1]
    options = {
        "--model": arguments.folder / "model",
        "--host": "127.0.0.1",
        "--port": port,
        "--max_model_len": 256 + arguments.completion_length,
        "--gpu_memory_utilization": 0.85,
        "--log_level": "warning",
        "--max-num-seqs": min(1024, arguments.prompts * arguments.generations),
    }
    line = [text for option in options.items() for text in map(str, option)]
    return subprocess.Popen(
        [sys.executable, "-m", "trl.scripts.vllm_serve", *line],
        env=os.environ | TRL_ENV | {"CUDA_VISIBLE_DEVICES": second},
        stdout=sys.stderr,
    )


def free_ports(n):
    """Ports that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def wait_for_server(arguments):
    """Wait until the server answers; raise at once if it has ended."""
    server = psutil.Process(arguments.server_pid)
    deadline = time.monotonic() + arguments.timeout_s
    while time.monotonic() < deadline and server.status() != psutil.STATUS_ZOMBIE:
        with contextlib.suppress(OSError):
            urlopen(f"http://127.0.0.1:{arguments.port}/health", timeout=5).close()
            return
        time.sleep(0.5)
    raise RuntimeError("trl vllm-serve did not come up; its own messages are above")


def trainer(arguments):
    """Steps of TRL's GRPOTrainer."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOTrainer

    on_gpu, model = arguments.device == "cuda", arguments.folder / "model"
    rows = [json.loads(line) for line in (arguments.folder / "train.jsonl").open()]
    ends, lengths = make_step_ends(), []

    def reward(completion_ids, **columns):
        lengths.append([len(ids) for ids in completion_ids])
        return [float(ids[0] % 2) for ids in completion_ids]

    settings = trl_settings(arguments)
    if on_gpu and arguments.gpus == 2:
        wait_for_server(arguments)
    trainer = GRPOTrainer(
        model=str(model),
        args=settings,
        reward_funcs=reward,
        train_dataset=Dataset.from_list([{"prompt": row["messages"]} for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
        callbacks=[ends],
    )
    ends.time("rollout", trainer, "_generate_and_score_completions")
    if on_gpu:
        ends.time("weight_sync", trainer.vllm_generation, "sync_weights")
    trainer.train()
    return trl_summary(arguments, ends, lengths)


def make_step_ends():
    """A callback that knows when steps ended, and how long their phases had taken by then."""
    from transformers import TrainerCallback

    class StepEnds(TrainerCallback):
        def __init__(self):
            self.times, self.phases, self.seconds = [], [], Counter()

        def on_step_end(self, args, state, control, **kwargs):
            self.times.append(time.monotonic())
            self.phases.append(dict(self.seconds))
            self.seconds.clear()

        def time(self, phase, target, method):
            """Count the seconds of a method."""
            function = getattr(target, method)

            def timed(*args, **kwargs):
                start = time.monotonic()
                try:
                    return function(*args, **kwargs)
                finally:
                    self.seconds[phase] += time.monotonic() - start

            setattr(target, method, timed)

    return StepEnds()


def trl_settings(arguments):
    """The GRPOConfig of the same work."""
    from trl import GRPOConfig

    on_gpu = arguments.device == "cuda"
    completions, batch_size = trl_sizes(arguments)
    return GRPOConfig(
        output_dir=str(arguments.folder / "trl"),
        max_steps=arguments.warm_up + arguments.steps,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=completions // batch_size,
        num_generations=arguments.generations,
        max_completion_length=arguments.completion_length,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        beta=0.0,
        loss_type="dapo",
        bf16=on_gpu,
        use_cpu=not on_gpu,
        gradient_checkpointing=False,
        optim="adamw_torch_fused" if on_gpu else "adamw_torch",
        model_init_kwargs={
            "dtype": "bfloat16" if on_gpu else "float32",
            "attn_implementation": arguments.trl_attention,
        },
        use_vllm=on_gpu,
        **(vllm_settings(arguments) if on_gpu else {}),
        vllm_importance_sampling_correction=False,
        generation_kwargs={"ignore_eos": True} if on_gpu else None,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def trl_sizes(arguments):
    """Completions of a step, and of a forward pass."""
    completions = arguments.prompts * arguments.generations
    return completions, min(arguments.trl_batch_size, completions)


def trl_summary(arguments, ends, lengths):
    """Seconds and tokens of the steps after the warm-up; `lengths`: of completions, by step."""
    completions, batch_size = trl_sizes(arguments)
    seconds = [end - start for start, end in zip(ends.times, ends.times[1:], strict=False)]
    seconds = seconds[arguments.warm_up - 1 :]
    assert all(len(step) == completions for step in lengths)
    tokens = statistics.median(sum(step) for step in lengths[arguments.warm_up :])
    step_s = statistics.median(seconds)
    phases = {
        name: statistics.median(step.get(name, 0.0) for step in ends.phases[arguments.warm_up :])
        for name in ("rollout", "weight_sync")
    }
    phases["rollout"] -= phases["weight_sync"]  # which is a part
    phases["policy_update"] = step_s - sum(phases.values())
    return {
        "measured_steps": len(seconds),
        "measured_between": [ends.times[arguments.warm_up - 1], ends.times[-1]],
        "step_s": step_s,
        "step_s_of_each": seconds,
        "completion_tokens": tokens,
        "completion_tokens_per_second": tokens / step_s,
        "phases_s": phases,
        "batch_size": batch_size,
    }


def vllm_settings(arguments):
    """GRPOConfig's fields of vLLM: a server on the second GPU, or in the trainer's process."""
    if arguments.gpus == 2:
        return {
            "vllm_mode": "server",
            "vllm_server_base_url": f"http://127.0.0.1:{arguments.port}",
            "vllm_group_port": arguments.group_port,
        }
    return {
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": arguments.trl_gpu_memory_utilization,
        "vllm_max_model_length": 256 + arguments.completion_length,
        "vllm_enable_sleep_mode": bool(arguments.trl_sleep),
    }


WHAT = {"save": save, "trl": trl, "trainer": trainer, "rlsys": rlsys, "rlsys_ahead": rlsys}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-1.5b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--prompts", type=int, default=32, help="of a step")
    parser.add_argument("--generations", type=int, default=8, help="of a prompt")
    parser.add_argument("--completion_length", type=int, default=512, help="tokens, of all")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of each")
    parser.add_argument("--warm_up", type=int, default=1, help="steps before, 1 at least")
    parser.add_argument("--gpus", type=int, choices=[1, 2], default=2)
    parser.add_argument("--what", nargs="+", choices=SIDES, default=["trl", "rlsys"])
    parser.add_argument("--trl_batch_size", type=int, default=16, help="completions a forward pass")
    parser.add_argument("--trl_attention", default="sdpa")
    parser.add_argument("--trl_sleep", type=int, choices=[0, 1], default=0, help="on one GPU")
    parser.add_argument(
        "--trl_gpu_memory_utilization", type=float, default=0.3, help="its default, on one GPU"
    )
    parser.add_argument("--out", type=Path, help="file for the results, also while it runs")
    parser.add_argument("--timeout_s", type=float, default=280, help="of each side")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--one", choices=WHAT, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=8000, help=argparse.SUPPRESS)
    parser.add_argument("--server_pid", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--group_port", type=int, default=51216, help=argparse.SUPPRESS)
    arguments, arguments.rlsys_options = parser.parse_known_args()
    for option in arguments.rlsys_options:
        if option.startswith("--") and "." not in option:
            parser.error(f"unknown option {option}")
    if arguments.gpus == 1 and "rlsys_ahead" in arguments.what:
        parser.error("rlsys_ahead needs two GPUs: on one, policy and engine take turns")
    return arguments


if __name__ == "__main__":
    main()
