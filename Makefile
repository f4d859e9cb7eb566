# `make demo` and `make test` need Python 3.11+, make and a package registry, and nothing else.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help demo test doctest format format-check lint types check bench sanitize kernels-emulated test-lowest clean

help:
	@echo 'make demo          quantize a real model with nine recipes and print the table'
	@echo 'make test          run the tests'
	@echo 'make doctest       run the examples in docstrings, README.md, CONTRIBUTING.md and docs/'
	@echo 'make format        format the code and mend what the linter can mend'
	@echo 'make lint, types   run the linter, the type checker'
	@echo 'make check         run all of the above but the demo, as CI does'
	@echo 'make bench         run the benchmarks that take minutes (quality.py takes hours)'
	@echo 'make sanitize      run the native kernels with sanitizers'
	@echo 'make kernels-emulated'; echo '                   run the native kernels of every instruction set, emulated'
	@echo 'make test-lowest   run the tests with the oldest supported jax, flax and numpy'
	@echo 'make clean         remove the environments and caches'

demo: $(VENV)/.cli
	$(BIN)/qwix demo

test: $(VENV)/.dev
	$(BIN)/pytest -n $(JOBS)

# One file's examples share their names, so they stay on one worker.
doctest: $(VENV)/.dev
	$(BIN)/pytest --doctest-modules -n $(JOBS) --dist loadfile qwix README.md CONTRIBUTING.md docs

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

format-check: $(VENV)/.dev
	$(BIN)/ruff format --check .

lint: $(VENV)/.dev
	$(BIN)/ruff check .

types: $(VENV)/.dev
	$(BIN)/mypy

check:
	.ci/run

bench: $(VENV)/.dev
	for script in $(filter-out benchmarks/quality.py,$(wildcard benchmarks/*.py)); do \
	    $(BIN)/python "$$script" || exit 1; done

# The tests of the native kernels under AddressSanitizer and UndefinedBehaviorSanitizer; needs g++.
sanitize: $(VENV)/.dev
	$(BIN)/python -m qwix.cpu.build --sanitize build/sanitized.so
	LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libubsan.so)" \
	    ASAN_OPTIONS=detect_leaks=0 QWIX_CPU_LIBRARY=build/sanitized.so $(BIN)/pytest tests/cpu

# The same tests of the kernels of every instruction set, on SIMDe's functions; needs g++ and libsimde-dev.
kernels-emulated: $(VENV)/.dev
	$(BIN)/python -m qwix.cpu.build --emulate build/emulated.so
	QWIX_CPU_LIBRARY=build/emulated.so $(BIN)/pytest tests/cpu

test-lowest: .venv-lowest/.lowest
	.venv-lowest/bin/pytest -n $(JOBS)

clean:
	rm -rf $(VENV) .venv-lowest build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# A stamp is written when its step is through, so that an interrupted one runs again.
$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.cli: pyproject.toml | $(VENV)/.created
	$(PIP) install --quiet -e '.[cli]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/.created
	$(PIP) install --quiet -e '.[dev]'
	@touch $(VENV)/.cli $@

# The core dependencies at their lower bounds, each `>=` read as `==`.
.venv-lowest/.lowest: pyproject.toml
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -c 'import tomllib; \
	    deps = tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]; \
	    print(*(dep.replace(">=", "==") for dep in deps), sep="\n")' > .venv-lowest/constraints.txt
	.venv-lowest/bin/python -m pip --disable-pip-version-check install --quiet \
	    -c .venv-lowest/constraints.txt -e '.[dev]'
	@touch $@
