"""The mathematics of GRPO: pure torch on CPU or GPU tensors, without Ray, vLLM or megatron-core.

    advantages   rewards -> advantages of tokens, the only place where completions meet each other
    weighting    what is left out of the loss, and the denominators of an optimizer step
    batching     groups -> TrainBatch -> optimizer steps -> shards -> packed micro-batches
    logprobs     logits (or hidden states) -> log-probs and entropy, over a split vocabulary too
    losses       the losses by name and what they report: base, clipped, others, correction
    kl           estimates of the KL to the reference
    segments     sums and means over the sequences of a packed micro-batch
    metrics      what a rollout and an update log

Legend: **P** prompts, **G** generations per prompt, **N = P*G** completions, **S** tokens of a
padded row, **T** tokens of a packed micro-batch, **B** sequences in it, **V** vocabulary,
**H** hidden size.
"""
