"""The model families that rlsys trains, each in a file of its own."""

from rlsys.model.families.llama import LLAMA
from rlsys.model.families.mistral import MISTRAL
from rlsys.model.families.qwen2 import QWEN2
from rlsys.model.families.qwen3 import QWEN3
from rlsys.model.families.qwen3_moe import QWEN3_MOE

FAMILIES = {
    family.model_type: family
    for family in (
        LLAMA,
        MISTRAL,
        QWEN2,
        QWEN3,
        QWEN3_MOE,
    )
}
"""model_type of config.json -> its family."""
