"""OLMo-2: norms after attention and MLP, q and k normalised over all heads together."""

from rlsys.model.families.base import ModelFamily
from rlsys.model.families.qwen3 import QK_NORM_KEYS

OLMO2 = ModelFamily(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    inert=QK_NORM_KEYS | {"sliding_window": ()},
    heads_divide_hidden=True,
    constants={"has_qk_norm": True},
    qk_norm_of_all_heads=True,
    norms="post",
)
