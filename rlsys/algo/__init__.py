"""The mathematics of GRPO: pure torch on CPU or GPU tensors, without Ray, vLLM or megatron-core.

    advantages   rewards -> advantages_PG, the only place where completions meet each other
    batching     groups -> TrainBatch -> optimizer steps -> shards -> packed micro-batches
    logprobs     logits (or hidden states) -> log-probs and entropy, over a split vocabulary too
    losses       the token losses and what they report
    metrics      what a rollout and an update log

Legend: **P** prompts, **G** generations per prompt, **N = P*G** completions, **S** tokens of a
padded row, **T** tokens of a packed micro-batch, **B** sequences in it, **V** vocabulary,
**H** hidden size.
"""
