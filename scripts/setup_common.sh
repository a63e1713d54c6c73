# Sourced by setup_cpu.sh and setup_gpu.sh: a virtual environment in VENV, and pip in it.
# The caller sets VENV, and SUPPORTED, the Python versions that its pinned set is for.
PY=$VENV/bin/python
LOG=$VENV/setup.log

fail() { printf 'setup failed: %s\n' "$1" >&2; exit 1; }
say() { printf '%s\n' "$1"; }

supported() {
    "$1" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] not in '$SUPPORTED'.split())" 2>/dev/null
}

find_python() {
    local candidate tried=""
    for candidate in ${PYTHON:-python3 $(printf 'python%s ' $SUPPORTED)}; do
        if supported "$candidate"; then echo "$candidate"; return; fi
        tried+=", $candidate ($("$candidate" --version 2>/dev/null || echo 'does not run'))"
    done
    fail "Python ${SUPPORTED/ / or } is needed; found${tried#,}. Install it, or name it: make $1 PYTHON=/path/to/python3.12"
}

create_venv() {  # $1: the make target, for the errors
    local python
    if [ -x "$PY" ] && "$PY" -m pip --version >/dev/null 2>&1; then
        supported "$PY" || fail "$VENV holds $("$PY" --version), and ${SUPPORTED/ / or } is needed. Remove it (rm -r $VENV) and try again."
    else
        python=$(find_python "$1") || exit 1
        "$python" -c 'import venv, ensurepip' 2>/dev/null ||
            fail "$python has no venv module. On Debian and Ubuntu: sudo apt install python3-venv"
        "$python" -m venv --clear "$VENV"
    fi
    : >"$LOG"
}

pip() {  # quiet: its output goes to the log, and is shown when setup fails
    "$PY" -m pip --disable-pip-version-check --no-input install --no-compile "$@" >>"$LOG" 2>&1
}

byte_compile() {  # on all cores, which pip does on one
    # Where PYTHONDONTWRITEBYTECODE is set, as in many containers, each process would compile all
    # that it imports: 10 s of the 20 s that `import vllm` takes.
    say "compiling the packages to bytecode"
    # Some packages hold files for other versions of Python, which is no failure.
    "$PY" -m compileall -q -j 0 "$("$PY" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" rlsys \
        >>"$LOG" 2>&1 || true
}

fail_with_log() {  # $1: what failed
    tail -n 20 "$LOG" >&2
    fail "$1. pip's last lines are above, all of them in $LOG"
}

check_imports() {  # the rest of a Python program on standard input
    say "checking that the packages work together"
    "$PY" - >>"$LOG" 2>&1 || {
        tail -n 20 "$LOG" >&2
        fail "the packages do not import together; more with: $VENV/bin/rlsys doctor"
    }
}

say_ready() {
    say "ready: $VENV ($("$PY" --version), torch $("$PY" -c "from importlib.metadata import version; print(version('torch'))"))"
}
