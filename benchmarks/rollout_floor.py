"""The least time of a decode step: what it has to read, over the memory's bandwidth.

Every step reads all weights once, and the keys and values of each sequence's tokens. Nothing else
is counted: neither the embedding's rows, nor logits, nor what the sampler does.
"""

import time

import torch

from rlsys.model.memory import engine_weight_bytes

COPY_BYTES = 2 * 2**30
COPIES = 10


def floor(config, shape, *, device, sequences, context, bytes_per_s):
    """The bytes of a step and its least milliseconds.

    Args:
        config: of a rollout engine.
        shape: of its model.
        sequences: that get a token in the step.
        context: tokens of each, on average.
        bytes_per_s: of the memory.
    """
    tp = config.rollout.tensor_parallel_size
    weights, _ = engine_weight_bytes(config, shape, device)
    if not shape.tied:  # a step reads a row for each token of the embedding, and all of the head
        weights -= shape.embedding_params / tp * width_of(config, device)
    per_token = shape.kv_elements_per_token(tp) * width_of(config, device)
    keys_and_values = sequences * context * per_token
    return {
        "weight_gb": weights / 1e9,
        "kv_gb": keys_and_values / 1e9,
        "floor_ms": 1e3 * (weights + keys_and_values) / bytes_per_s,
    }


def width_of(config, device):
    """Bytes of a number."""
    return {"float32": 4, "bfloat16": 2}[config.model_dtype(on_cpu=device == "cpu")]


def beside_floor(config, shape, *, device, sequences, context, step_ms, bytes_per_s):
    """A measured step next to its floor."""
    least = floor(
        config, shape, device=device, sequences=sequences, context=context, bytes_per_s=bytes_per_s
    )
    return {
        "context": context,
        **least,
        "step_ms": step_ms,
        "step / floor": step_ms / least["floor_ms"],
        "tokens_per_second": 1e3 * sequences / step_ms,
    }


def bandwidth(device):
    """Bytes a second of the device's memory: a copy reads and writes."""
    number = COPY_BYTES if device == "cuda" else COPY_BYTES // 32
    source = torch.empty(number, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    wait()
    start = time.perf_counter()
    for _ in range(COPIES):
        target.copy_(source)
    wait()
    return 2 * number * COPIES / (time.perf_counter() - start)
