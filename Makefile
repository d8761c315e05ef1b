# make demo    set up and generate text from the bundled model with a quarter of its experts resident
# make test    set up and run the default test suite
# make families  put every family that transformers knows to the proof and write docs/families.md
# make check   formatting, lint, types and import layers
# make slow    the tests marked slow
# make clean   remove the environment, builds and caches

PYTHON ?= python3
VENV := .venv
DEMO = $(VENV)/bin/fate run assets/mini-moe "Question: Tom has 3 apples and buys 5 more. How many apples does he have?" --experts 25% --max-new-tokens 60 --seed 1

INSTALLED := $(VENV)/.installed
NATIVE := $(shell find src CMakeLists.txt -name CMakeLists.txt -o -name '*.cmake' -o -name '*.cpp' -o -name '*.h' -o -name '*.hpp')

# The environment is this project's alone: nothing of the caller's may leak in.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV

.PHONY: setup demo test check slow families clean
.DELETE_ON_ERROR:

setup: $(INSTALLED)

# Python sources are read from src/ as they are; only what changes the build or the dependencies reinstalls.
$(INSTALLED): pyproject.toml constraints.txt $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(VENV)/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(INSTALLED)
	$(DEMO)

test: $(INSTALLED)
	@$(VENV)/bin/python -m pytest -q -n 2 --dist loadfile

slow: $(INSTALLED)
	@$(VENV)/bin/python -m pytest -q -m "slow and not cuda"

families: $(INSTALLED)
	@HF_HUB_OFFLINE=1 PYTHONPATH=tests $(VENV)/bin/python -m sweep

check: $(INSTALLED)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest -q tests/test_imports.py

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
