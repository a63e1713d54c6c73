# make          set up the environment (does nothing when nothing changed)
# make demo     watch a small language model learn the Countdown game, on CPU
# make test     lint, types and tests
# make test-all the same with the slowest tests: servers and whole runs of their own
# make test-gpu the tests that need GPUs, with the python3 of this shell and what it has installed
#
# VENV=dir uses another environment, PYTHON=python3.12 another interpreter to create it with (or
# to run test-gpu with).

VENV ?= .venv
STAMP := $(VENV)/.setup-done

setup: $(STAMP)

$(STAMP): requirements/cpu.txt pyproject.toml scripts/setup_cpu.sh
	@VENV="$(VENV)" PYTHON="$(PYTHON)" scripts/setup_cpu.sh
	@touch $@

demo: setup
	$(VENV)/bin/python examples/countdown/demo.py

test: lint
	$(VENV)/bin/python -m pytest -m "not slow"

test-all: lint
	$(VENV)/bin/python -m pytest

test-gpu:
	$(or $(PYTHON),python3) -m pytest tests/gpu -m gpu -ra --durations=10

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf build .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) *.egg-info

.PHONY: setup demo test test-all test-gpu lint clean distclean
