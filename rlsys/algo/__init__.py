"""The mathematics of GRPO: pure torch on CPU or GPU tensors, without Ray, vLLM or megatron-core.

    advantages        rewards -> advantages of tokens: only here are completions compared
    weighting         the weight of each token in an optimizer step, and tokens that are left out
    batching          groups -> TrainBatch -> optimizer steps -> shards -> packed micro-batches
    context_parallel  the tokens of a micro-batch cut over ranks, and gathered again
    sampling          the distribution that completions are sampled from
    logprobs          hidden states -> log-probs and entropies, also over a split vocabulary
    losses            the losses by name and what they report: base, clipped, others, correction
    kl                estimates of the KL to the reference
    segments          sums over the sequences of a packed micro-batch
    rollout_metrics   what a rollout logs
    update_metrics    what an update logs

Legend: **P** prompts, **G** generations per prompt, **N = P*G** completions, **S** tokens of a
padded row, **T** tokens of a packed micro-batch, **B** sequences in it, **V** vocabulary,
**H** hidden size.
"""
