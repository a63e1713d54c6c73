"""The mathematics must stay usable and testable without the system around it."""

import subprocess
import sys

IMPORTS = """
import sys
import rlsys.algo.advantages, rlsys.algo.batching, rlsys.algo.logprobs
import rlsys.algo.losses, rlsys.algo.metrics
heavy = ("ray", "vllm", "megatron", "transformers", "pydantic")
print([name for name in heavy if name in sys.modules])
"""


def test_algo_imports_neither_ray_nor_an_engine():
    result = subprocess.run(
        [sys.executable, "-c", IMPORTS], check=True, capture_output=True, text=True
    )
    assert result.stdout.strip() == "[]"
