# Two commands matter: `make demo` and `make test`. Each sets up everything it needs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow check page clean

demo: .venv/.base
	$(BIN)/receptance run "Once upon a time, there was a little rabbit" --echo --max-tokens 200 --seed 9

test: .venv/.dev
	@scripts/browser
	$(BIN)/python -m pytest -n 2

test-slow: .venv/.dev
	@scripts/browser
	$(BIN)/python -m pytest -n 2 -m "slow or not slow"

check: .venv/.dev
	scripts/check

page:  # the page in a browser, built anew; needs Node and npm
	$(PYTHON) scripts/page

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.base: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

.venv/.dev: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@ .venv/.base

clean:
	rm -rf .venv
