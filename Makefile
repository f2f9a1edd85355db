# `make demo` and `make test` set up everything they need on a machine that has Python 3.11 or newer, then do their
# work. A second call skips what is already set up. On Linux without a GPU, the CPU build of torch is the smaller download:
#     make demo PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"

VENV      ?= .venv
PY        := $(VENV)/bin/python
DEMO      ?= demo
DEMO_ARGS ?=
PIP_FLAGS ?=
# --no-compile: of the tens of thousands of files that torch brings, COMPILE has those compiled that are imported,
# also where PYTHONDONTWRITEBYTECODE is set, as in many containers: else every start would take half a minute
PIP       := $(PY) -m pip --disable-pip-version-check install -qq --no-compile -c constraints.txt $(PIP_FLAGS)

COMPILE   := env -u PYTHONDONTWRITEBYTECODE $(PY) -c \
  'import hyperdreambooth.apps.personalization; from hyperdreambooth import load_base; load_base()'

.DEFAULT_GOAL := help
.PHONY: help demo test slow quantised check format reproduce clean

help:
	@echo "make demo       one photo -> LoRA -> pictures, offline, in ./$(DEMO)"
	@echo "make test       the tests, in about four minutes on two cores"
	@echo "make slow       the long tests: real sizes, repeated kills"
	@echo "make quantised  the tests of quantised bases, with torchao and bitsandbytes"
	@echo "make check      ruff, pyright, import-linter"
	@echo "make format     ruff format and ruff check --fix"
	@echo "make reproduce  every shipped weight from seeds (hours; resumable)"
	@echo "make clean      remove $(VENV) and caches"

demo: $(VENV)/.installed
	@$(VENV)/bin/hdb demo --out $(DEMO) $(DEMO_ARGS)

test: $(VENV)/.installed-dev
	@$(PY) tests/suite.py

# real sizes and repeated kills: a single test may take minutes
slow: $(VENV)/.installed-dev
	@$(PY) tests/suite.py -m slow --timeout 900 -o faulthandler_timeout=960

# torchao and bitsandbytes are slow to import, so they lie beside the environment. pip compiles them: otherwise
# Python's warning about one of torchao's files would be an error in the tests
quantised: $(VENV)/.installed-dev
	@test -d build/quantised || $(PY) -m pip --disable-pip-version-check install -qq --no-deps \
	  --target build/quantised -c constraints.txt torchao bitsandbytes
	@PYTHONPATH=build/quantised $(PY) -m pytest tests/base/test_quantize.py

check: $(VENV)/.installed-dev
	$(PY) -m ruff check --no-cache .
	$(PY) -m ruff format --check src tests benchmarks examples
	$(PY) -m pyright
	$(VENV)/bin/lint-imports

format: $(VENV)/.installed-dev
	$(PY) -m ruff format src tests benchmarks examples
	$(PY) -m ruff check --fix .

reproduce: $(VENV)/.installed
	@PATH="$(abspath $(VENV))/bin:$$PATH" bash runs/reproduce.sh

$(PY):
	@for python in $(PYTHON) python3 python3.13 python3.12 python3.11 python; do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "creating $(VENV) with $$($$python --version)"; \
	    $$python -m venv $(VENV) && exit 0; \
	    rm -rf $(VENV); echo "error: $$python cannot make a virtual environment (on Debian: apt install python3-venv)" >&2; exit 2; \
	  fi; \
	done; echo "error: found no Python 3.11 or newer; install one, or run: make PYTHON=/path/to/python3" >&2; exit 2

$(VENV)/.installed: pyproject.toml constraints.txt | $(PY)
	@echo "installing the package and what it runs on (once; torch is the large one) ..."
	@start=$$(date +%s); $(PIP) -e . && $(COMPILE) && touch $@ && echo "installed in $$(( $$(date +%s) - start )) s"

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing the development tools ..."
	@start=$$(date +%s); $(PIP) -e '.[dev]' && touch $@ && echo "installed in $$(( $$(date +%s) - start )) s"

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .import_linter_cache
