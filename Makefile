# make            set up the environment (does nothing if nothing changed)
# make setup-gpu  the same for GPUs, in .venv-gpu
# make demo       watch a small language model learn the Countdown game, on CPU
# make test-fast  the pure parts, within a minute on two idle cores
# make test       lint, types and tests
# make test-all   also the slowest tests: servers and whole runs of their own
# make test-gpu   the tests that need GPUs, with .venv-gpu or else the python3 of this shell
# make test-browser  the tests of the page of `rlsys dashboard`, with a Chromium of this machine
# make dashboard  bundle the page of `rlsys dashboard` after a change of its sources; needs npm
# make audit      look for known holes in the pinned packages, where a database can be reached
#
# VENV=dir (for GPUs VENV_GPU=dir) uses another environment, PYTHON=python3.12 another interpreter
# to create it with (or to run test-gpu with).

VENV ?= .venv
VENV_GPU ?= .venv-gpu
STAMP := $(VENV)/.setup-done
STAMP_GPU := $(VENV_GPU)/.setup-done

setup: $(STAMP)

setup-gpu: $(STAMP_GPU)

$(STAMP): requirements/cpu.txt pyproject.toml scripts/setup_cpu.sh scripts/setup_common.sh
	@VENV="$(VENV)" PYTHON="$(PYTHON)" scripts/setup_cpu.sh
	@touch $@

$(STAMP_GPU): requirements/gpu.txt pyproject.toml scripts/setup_gpu.sh scripts/setup_common.sh
	@VENV_GPU="$(VENV_GPU)" PYTHON="$(PYTHON)" scripts/setup_gpu.sh
	@touch $@

demo: setup
	$(VENV)/bin/python examples/countdown/demo.py

test-fast: setup
	$(VENV)/bin/python -m pytest tests/unit -n 2 -m "not slow and not processes" --hypothesis-profile=fast

test: lint
	$(VENV)/bin/python -m pytest -n 2 -m "not slow"

test-all: lint
	$(VENV)/bin/python -m pytest -n 2

test-gpu:
	$(or $(PYTHON),$(wildcard $(VENV_GPU)/bin/python),python3) -m pytest tests/gpu -m gpu -ra --durations=10

audit: setup
	test -x $(VENV)-audit/bin/python || $(VENV)/bin/python -m venv $(VENV)-audit
	-$(VENV)-audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit
	$(VENV)-audit/bin/python scripts/audit.py

test-browser: setup
	$(VENV)/bin/python -m pip install --quiet --no-deps -r requirements/browser.txt
	$(VENV)/bin/python -m pytest tests/browser -ra

dashboard:
	npm --prefix rlsys/dashboard/web ci
	npm --prefix rlsys/dashboard/web test
	npm --prefix rlsys/dashboard/web run build

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf build .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) $(VENV_GPU) *.egg-info

.PHONY: setup setup-gpu demo dashboard test-browser test-fast test test-all test-gpu audit lint clean distclean
