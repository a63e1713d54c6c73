"""SFT on CPU: steps of `rlsys sft` and of transformers' Trainer, in turns. Prints JSON.

    python benchmarks/sft_cpu.py                            # SmolLM2-135M's shape, random weights
    python benchmarks/sft_cpu.py --modes packed --steps 8
    python benchmarks/sft_cpu.py --shape tiny --steps 3         # tries the script itself

Both train the same model in float32 on the same tokens, the answers of `--rows` samples a step, of
16 to `--tokens` tokens, with the same AdamW and clipping, on `--threads` threads, each number in
turn; `default` leaves each side its own choice. The losses of their steps are equal, which is
checked. Each is a process that waits for its turn between two
steps: one step of the one, then one of the other, so that what else the machine does meets both.
The first step of each is left out.

    unpacked   Trainer pads the samples of a step to the longest one; rlsys never pads
    packed     Trainer has one sequence of them all (DataCollatorWithFlattening), and a mask that
               keeps samples apart; rlsys the same
    alone      one sample a forward pass, whose gradients are added up

A ratio above 1 says that rlsys is faster. Ratios are of medians, and of CPU seconds, too.
`trained_tokens_per_second` counts the tokens that have a loss.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from machine import describe_machine
from random_model import SHAPES, save_random_model

MODES = ("unpacked", "packed", "alone")
WAIT, DONE = "@waiting", "@done"
DEFAULT = "default"
OPTIMIZER = {
    "max_grad_norm": 1.0,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
}
"""Settings that have the same name in both."""
LR, EPS = 1e-5, 1e-8


def main():
    arguments = parse_arguments()
    if arguments.side:
        {"rlsys": run_rlsys, "trainer": run_trainer}[arguments.side](arguments)
        return
    machine, results = describe_machine(), {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        save_random_model(folder / "model", arguments.shape, "cpu")
        write_samples(folder / "rows.jsonl", arguments)
        for threads in arguments.threads:
            for mode in arguments.modes:
                name = f"{mode}, threads: {threads}"
                results[name] = measure(mode, threads, folder, arguments)
                print(f"{name}: {json.dumps(results[name])}", file=sys.stderr, flush=True)
    settings = {key: vars(arguments)[key] for key in ("shape", "rows", "tokens")}
    print(json.dumps({"machine": machine, **settings, "results": results}, indent=2))


def write_samples(path, arguments):
    """Rows of one turn each; every digit is a token of the random model's tokenizer."""
    import random

    rng = random.Random(0)
    with path.open("w") as file:
        for _ in range(arguments.rows * (arguments.steps + 1)):
            length = rng.randint(16, arguments.tokens) - 8
            answer = "".join(rng.choices("0123456789", k=length))
            turns = [("user", "12"), ("assistant", answer)]
            messages = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"messages": messages}) + "\n")


def measure(mode, threads, folder, arguments):
    """Seconds of each side's steps, and what rlsys gains."""
    sides = {name: Side(name, mode, threads, folder) for name in ("trainer", "rlsys")}
    for _ in range(arguments.steps):
        for side in sides.values():
            side.step()
    for side in sides.values():
        side.close()
    result = {name: side.summary() for name, side in sides.items()}
    losses = [side["losses"] for side in result.values()]
    differences = [abs(theirs - ours) for theirs, ours in zip(*losses, strict=True)]
    if max(differences) > 1e-4 or len({str(side["tokens"]) for side in result.values()}) > 1:
        sys.exit(f"{mode}: the two do not train on the same: {json.dumps(result)}")
    result["largest_difference_of_losses"] = max(differences)
    for key in ("median_s", "median_cpu_s"):
        result[f"ratio_of_{key}"] = result["trainer"][key] / result["rlsys"][key]
    return result


class Side:
    """A process that takes one step each time that it may."""

    def __init__(self, name, mode, threads, folder):
        out = folder / f"{name}-{mode}-{threads}"
        options = ["--side", name, "--modes", mode, "--threads", threads]
        options += ["--folder", str(folder), "--out", str(out)]
        self._log = out.with_suffix(".log").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], *options],
            env=os.environ | ({} if threads == DEFAULT else {"OMP_NUM_THREADS": threads}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self._steps = []
        self._expect(WAIT)

    def step(self):
        before, started = self._cpu_seconds(), time.perf_counter()
        print("go", file=self._process.stdin, flush=True)
        loss, tokens = self._expect(DONE).split()
        seconds = time.perf_counter() - started
        used = self._cpu_seconds() - before
        self._steps.append((seconds, used, float(loss), int(float(tokens))))

    def close(self):
        self._process.stdin.close()
        self._process.terminate()
        self._process.wait(timeout=60)

    def summary(self):
        seconds, cpu_seconds, losses, tokens = zip(*self._steps[1:], strict=True)
        return {
            "trained_tokens_per_second": sum(tokens) / sum(seconds),
            "median_s": statistics.median(seconds),
            "median_cpu_s": statistics.median(cpu_seconds),
            "all_s": seconds,
            "all_cpu_s": cpu_seconds,
            "losses": losses,
            "tokens": tokens,
        }

    def _expect(self, word):
        for line in self._process.stdout:
            if line.startswith(word):
                return line.removeprefix(word).strip()
        self._log.seek(0)
        sys.exit(f"a side ended: {self._log.read()[-3000:]}")

    def _cpu_seconds(self):
        own = psutil.Process(self._process.pid)
        times = [each.cpu_times() for each in [own, *own.children(recursive=True)]]
        return sum(each.user + each.system for each in times)


class Turns:
    """This process's side of `Side`. What libraries print goes to stderr from here on."""

    def __init__(self):
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def take(self, loss=None, tokens=None):
        """Say that a step is done, if one was, on how many tokens; wait for the next one."""
        answer = WAIT if loss is None else f"{DONE} {loss} {tokens}"
        print(answer, file=self._answers, flush=True)
        if not sys.stdin.readline():
            if "ray" in sys.modules:
                sys.modules["ray"].shutdown()
            os._exit(0)


def run_rlsys(arguments):
    """`rlsys sft`, with a tracker that waits after each step."""
    from rlsys.config import SftConfig
    from rlsys.config.load import ResolvedConfig
    from rlsys.launch import run_sft
    from rlsys.tracking import Tracker, register_tracker

    turns = Turns()

    class Waits(Tracker):
        def log_metrics(self, step, metrics):
            turns.take(metrics["loss"], metrics["num_loss_tokens"])

        def close(self):
            pass

    register_tracker("turns")(lambda config, resumes_after: Waits())
    (mode,), (threads,) = arguments.modes, arguments.threads
    policy = {"lr": LR, "warmup_ratio": 0.0, "adam_eps": EPS, **OPTIMIZER}
    policy["global_batch_size"] = arguments.rows
    if threads != DEFAULT:
        policy["cpu_threads"] = int(threads)
    if mode == "alone":
        policy["micro_batch_size"] = 1
    else:
        policy["micro_batch_size"] = arguments.rows
    config = SftConfig.model_validate(
        {
            "output_dir": arguments.out,
            "max_steps": arguments.steps + 1,
            "device": "cpu",
            "data": {
                "dataset": [f"{arguments.folder}/rows.jsonl"],
                "max_length": 4096,
                "shuffle": False,
            },
            "model": {"path": f"{arguments.folder}/model"},
            "policy": policy,
            "tracking": {"report_to": ["turns"]},
            "checkpoint": {"save_steps": None},
        }
    )
    turns.take()
    run_sft(ResolvedConfig(config, {}))


def run_trainer(arguments):
    """transformers' Trainer on the same samples."""
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorWithFlattening,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    turns = Turns()

    class Waits(TrainerCallback):
        loss = None

        def on_step_begin(self, args, state, control, **kwargs):
            start = state.global_step * arguments.rows
            done = samples[max(start - arguments.rows, 0) : start]
            tokens = sum(label != -100 for row in done for label in row["labels"])
            turns.take(self.loss, tokens)

        def on_log(self, args, state, control, logs, **kwargs):
            self.loss = logs.get("loss", self.loss)

    (mode,), (threads,) = arguments.modes, arguments.threads
    if threads != DEFAULT:
        torch.set_num_threads(int(threads))
    tokenizer = AutoTokenizer.from_pretrained(f"{arguments.folder}/model")
    samples = []
    for line in Path(arguments.folder, "rows.jsonl").read_text().splitlines():
        messages = json.loads(line)["messages"]
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        prompt = tokenizer.apply_chat_template(
            messages[:1], tokenize=False, add_generation_prompt=True
        )
        ids, prompt_ids = (
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in (whole, prompt)
        )
        labels = [-100] * len(prompt_ids) + ids[len(prompt_ids) :]
        samples.append({"input_ids": ids, "labels": labels})

    def pad(rows):
        length = max(len(row["input_ids"]) for row in rows)
        filled = [length - len(row["input_ids"]) for row in rows]
        return {
            "input_ids": torch.tensor(
                [r["input_ids"] + [0] * n for r, n in zip(rows, filled, strict=True)]
            ),
            "labels": torch.tensor(
                [r["labels"] + [-100] * n for r, n in zip(rows, filled, strict=True)]
            ),
            "attention_mask": torch.tensor([[1] * (length - n) + [0] * n for n in filled]),
        }

    size = 1 if mode == "alone" else arguments.rows

    class InOrder(Trainer):
        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    trainer = InOrder(
        model=AutoModelForCausalLM.from_pretrained(f"{arguments.folder}/model"),
        args=TrainingArguments(
            output_dir=arguments.out,
            max_steps=arguments.steps + 1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=arguments.rows // size,
            learning_rate=LR,
            adam_epsilon=EPS,
            **OPTIMIZER,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=samples,
        data_collator=DataCollatorWithFlattening() if mode == "packed" else pad,
        callbacks=[Waits()],
    )
    trainer.train()


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["unpacked", "packed"])
    parser.add_argument("--rows", type=int, default=8, help="samples of a step")
    parser.add_argument("--tokens", type=int, default=192, help="of the longest sample")
    parser.add_argument("--steps", type=int, default=6, help="of each side, the first left out")
    cores = str(len(os.sched_getaffinity(0)))
    parser.add_argument("--threads", nargs="+", default=[cores, DEFAULT])
    for internal in ("--side", "--folder", "--out"):
        parser.add_argument(internal, default="", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
