"""Times how long each role of a run takes to start on CPU, and its memory then. Prints JSON.

    python benchmarks/startup.py                                       # the demo's starter model
    python benchmarks/startup.py --model runs/smollm2-135m-instruct

One role after the other, each alone on the machine; then all at once, as a run starts them.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import actor_processes, cpu_seconds, describe_machine

from rlsys.actors.group import START_TIMEOUT_S
from rlsys.actors.policy import PolicyActors
from rlsys.actors.ray_session import ray_session
from rlsys.actors.reference import ReferenceActors
from rlsys.actors.reward import RewardWorkers
from rlsys.actors.rollout import RolloutActors
from rlsys.actors.waiting import get_all
from rlsys.config import Config
from rlsys.preflight.before_start import load_data
from rlsys.system import start_system
from rlsys.tracking import Tracker

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "countdown"))
from problems import generate_problems, write_problems
from starter_model import write_starter_model


class NoTracker(Tracker):
    def close(self):
        pass


def main():
    machine = describe_machine()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="model folder; default: the starter model")
    model = parser.parse_args().model
    with tempfile.TemporaryDirectory() as folder:
        if model is None:
            model = Path(folder) / "starter"
            write_starter_model(model, seed=0)
        write_problems(Path(folder) / "train.jsonl", generate_problems(64, seed=0))
        config = make_config(Path(folder), model)
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the JSON
            result = {"model": model.name, **measure(config)}
    print(json.dumps({"machine": machine} | result, indent=2))


def make_config(folder, model):
    return Config.model_validate(
        {
            "output_dir": str(folder),
            "max_steps": 1,
            "device": "cpu",
            "data": {"dataset": [str(folder / "train.jsonl")], "max_prompt_length": 128},
            "model": {"path": str(model)},
            "rollout": {
                "generation_batch_size": 64,
                "max_completion_length": 64,
                "max_num_seqs": 64,
            },
            "reward": {"reward_funcs": ["countdown", "format"]},
            "grpo": {"beta": 0.001},
        }
    )


def measure(config):
    seconds = {"import of the driver": timed(import_driver)[0]}
    seconds["data"], data = timed(lambda: load_data(config))
    session = ray_session()
    seconds["Ray"] = timed(session.__enter__)[0]
    processes = {}
    for role, (actor_class, start) in ROLES.items():
        seconds[role], actors = timed(lambda start=start: start(config))
        found = actor_processes(actor_class)
        processes[role] = {
            "cpu_seconds": round(cpu_seconds(found), 2),
            "memory_gib": round(sum(process.memory_info().rss for process in found) / 2**30, 2),
        }
        actors.close()
        while actor_processes(actor_class):
            time.sleep(0.1)
    seconds["all roles together"] = timed(lambda: start_system(config, data, NoTracker()))[0]
    session.__exit__(None, None, None)
    return {"seconds": seconds, "processes": processes}


def timed(action):
    start = time.perf_counter()
    result = action()
    return round(time.perf_counter() - start, 2), result


def import_driver():
    subprocess.run([sys.executable, "-c", "import rlsys.launch"], check=True)


def start_rewards(config):
    workers = RewardWorkers(config.reward, run_values=config.run_values)
    workers.start()
    return workers


def start_policy(config):
    return wait_for(PolicyActors(config, device="cpu"))


def start_reference(config):
    return wait_for(ReferenceActors(config, device="cpu"))


def start_rollout(config):
    return wait_for(RolloutActors(config, device="cpu"))


def wait_for(actors):
    get_all(actors.async_start(), phase="start", timeout_s=START_TIMEOUT_S)
    return actors


ROLES = {
    "reward worker": ("RewardWorker", start_rewards),
    "policy": ("PolicyRank", start_policy),
    "reference": ("ReferenceRank", start_reference),
    "rollout engine": ("RolloutActor", start_rollout),
}


if __name__ == "__main__":
    main()
