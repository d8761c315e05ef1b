# make demo    set up and generate text from the bundled model with a quarter of its experts resident
# make test    set up and run the default test suite
# make families  put every family that transformers knows to the proof and write docs/families.md
# make fuzz    random calls of the kernels against float64, then under AddressSanitizer and ThreadSanitizer
# make check   formatting, lint, types and import layers
# make slow    the tests marked slow
# make clean   remove the environment, builds and caches

PYTHON ?= python3
VENV := .venv
DEMO = $(VENV)/bin/fate run assets/mini-moe "Question: Tom has 3 apples and buys 5 more. How many apples does he have?" --experts 25% --max-new-tokens 60 --seed 1

comma := ,

INSTALLED := $(VENV)/.installed
NATIVE := $(shell find src CMakeLists.txt -name CMakeLists.txt -o -name '*.cmake' -o -name '*.cpp' -o -name '*.h' -o -name '*.hpp')

# The environment is this project's alone: nothing of the caller's may leak in.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV

.PHONY: setup demo test check slow families fuzz clean
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

FUZZ_ROUNDS ?= 1000
FUZZ_SEED ?= 1
PLANTED = x bias out high affine low experts-record
fuzz_driver = $(VENV)/bin/python -m pip wheel -q --disable-pip-version-check --no-deps -w build/fuzz/wheels . \
	-Cbuild-dir=build/fuzz/$(1) -Ccmake.define.FATE_FUZZ=$(2) -Cbuild.targets=kernel_fuzz -Cinstall.components=none

# The driver must end where a buffer is an element short, or its silence would mean nothing.
fuzz: $(INSTALLED)
	PYTHONPATH=tests $(VENV)/bin/python -m kernel_fuzz $(FUZZ_ROUNDS) $(FUZZ_SEED)
	$(call fuzz_driver,address,address$(comma)undefined)
	$(call fuzz_driver,thread,thread)
	@for what in $(PLANTED); do if build/fuzz/address/kernel_fuzz --plant $$what >/dev/null 2>&1; \
		then echo "planted in $$what: not noticed"; exit 1; fi; done; echo "planted: all noticed"
	build/fuzz/address/kernel_fuzz $(FUZZ_ROUNDS) $(FUZZ_SEED)
	build/fuzz/thread/kernel_fuzz $(FUZZ_ROUNDS) $(FUZZ_SEED)

check: $(INSTALLED)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest -q tests/test_imports.py

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find benchmarks src tests -name __pycache__ -type d -prune -exec rm -rf {} +
