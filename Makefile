# make demo opens the studio, make test runs the tests; both install first what they need.
VENV   ?= .venv
BIN    := $(VENV)/bin
EXTRAS ?= data,dev
PORT   ?= 7860
SHARDS ?= data/icons
comma  := ,
STAMP  := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all lint format shards browser clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP)  ## make .venv and install the project in it

# A Python of 3.11 or later: python3.11 where there is one, else python3 when new enough, else a word about it.
$(BIN)/python:
	@for python in $(or $(PYTHON),python3.11 python3 python3.12 python3.13); do \
		if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			echo "making $(VENV) with $$($$python --version)"; exec $$python -m venv $(VENV); \
		fi; \
	done; \
	echo "error: no Python 3.11 or later found: install one, or name it with PYTHON=/path/to/python3.11" >&2; exit 1

# torch first, under its pin, so that nothing later can bring another.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt torch
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

demo: install  ## open the studio on http://127.0.0.1:7860 (PORT=...)
	$(BIN)/diffusionfm demo --port $(PORT)

# The browser tests drive Debian's Chromium; elsewhere they use any chromium or google-chrome on the PATH.
browser:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || { \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null; \
		else \
			echo "note: no Chromium found (Debian: apt-get install chromium): the browser tests will be skipped" >&2; \
		fi; }

# Two files of tests at a time, one thread each: tiny networks gain nothing from a second.
test: install browser  ## run the tests that take seconds each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu"

test-all: install browser  ## run every test (GPU tests skip without one)
	$(BIN)/python -m pytest

lint: install  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

shards: install  ## build the open-icons corpus in data/icons (SHARDS=...)
	$(BIN)/diffusionfm shards build configs/data/icons.yaml --out $(SHARDS)

clean:  ## remove what builds and tests leave; runs, shards and .venv stay
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .gradio
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
