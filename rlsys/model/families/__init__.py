"""The model families that rlsys trains, each in a file of its own."""

from rlsys.model.families.deepseek_v2 import DEEPSEEK_V2
from rlsys.model.families.deepseek_v3 import DEEPSEEK_V3
from rlsys.model.families.gemma3 import GEMMA3
from rlsys.model.families.glm4_moe import GLM4_MOE
from rlsys.model.families.llama import LLAMA
from rlsys.model.families.ministral import MINISTRAL
from rlsys.model.families.ministral3 import MINISTRAL3
from rlsys.model.families.mistral import MISTRAL
from rlsys.model.families.olmo2 import OLMO2
from rlsys.model.families.olmo3 import OLMO3
from rlsys.model.families.phi3 import PHI3
from rlsys.model.families.qwen2 import QWEN2
from rlsys.model.families.qwen2_moe import QWEN2_MOE
from rlsys.model.families.qwen3 import QWEN3
from rlsys.model.families.qwen3_5 import QWEN3_5
from rlsys.model.families.qwen3_5_moe import QWEN3_5_MOE
from rlsys.model.families.qwen3_moe import QWEN3_MOE
from rlsys.model.families.qwen3_next import QWEN3_NEXT
from rlsys.model.families.seed_oss import SEED_OSS
from rlsys.model.families.smollm3 import SMOLLM3

FAMILIES = {
    family.model_type: family
    for family in (
        DEEPSEEK_V2,
        DEEPSEEK_V3,
        GEMMA3,
        GLM4_MOE,
        LLAMA,
        MISTRAL,
        MINISTRAL,
        MINISTRAL3,
        OLMO2,
        OLMO3,
        PHI3,
        QWEN2,
        QWEN2_MOE,
        QWEN3,
        QWEN3_5,
        QWEN3_5_MOE,
        QWEN3_MOE,
        QWEN3_NEXT,
        SEED_OSS,
        SMOLLM3,
    )
}
"""model_type of config.json -> its family."""
