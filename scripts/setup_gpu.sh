#!/usr/bin/env bash
# Creates a virtual environment with the pinned GPU set of requirements/gpu.txt, Transformer Engine's
# torch extension, compiled here, and this checkout. Linux on x86-64, Python 3.12, CUDA 13.
#
#   VENV_GPU=.venv-gpu PYTHON=python3.12 MAX_JOBS=16 scripts/setup_gpu.sh        (all optional)
#
# nvcc and all headers come from NVIDIA's wheels, so the machine needs a driver and g++, no toolkit.
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=${VENV_GPU:-.venv-gpu}
SUPPORTED="3.12"
. scripts/setup_common.sh

case "$(uname -sm)" in
"Linux x86_64") ;;
*) fail "the pinned GPU set is for Linux on x86-64, and this is $(uname -sm)" ;;
esac
command -v g++ >/dev/null ||
    fail "Transformer Engine's extension is compiled with g++, which is missing. On Debian and Ubuntu: sudo apt install g++"
nvidia-smi >/dev/null 2>&1 || say "note: no NVIDIA driver answers here; the set-up goes on, and runs will need one for CUDA 13"

create_venv setup-gpu
say "$(grep -c == requirements/gpu.txt) pinned packages: installing into $VENV (about 8 GB the first time)"
# Transformer Engine's metadata asks for a cuDNN front end whose own requirement contradicts vllm's
# pin of nvidia-cutlass-dsl, and does not use it: hence --no-deps, for the one complete list.
pip --no-deps -r requirements/gpu.txt || fail_with_log "pip could not install the pinned packages"
site=$("$PY" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")/nvidia
export CUDA_HOME=$site/cu13 CPATH=$site/cudnn/include:$site/nccl/include NVTE_FRAMEWORK=pytorch
te=$(sed -n 's/^transformer-engine==//p' requirements/gpu.txt)
say "transformer-engine-torch $te: compiling for this machine's torch (2 minutes on 16 cores)"
pip --no-deps --no-build-isolation "transformer-engine-torch==$te" ||
    fail_with_log "Transformer Engine's extension could not be compiled. NVIDIA's PyTorch containers have it"
pip --no-deps --no-build-isolation -e . || fail_with_log "pip could not install rlsys"
byte_compile
check_imports <<'CHECK'
from transformers import Qwen3ForCausalLM
import megatron.core, ray, rlsys, transformer_engine.pytorch, vllm
CHECK
say_ready
