# Two commands take a fresh machine to a chatting model and to a tested one: `make quickstart`, `make test`.
PYTHON ?= python3
MODEL ?= quickstart
BIN := .venv/bin

.PHONY: setup quickstart test lint

setup: .venv/installed

# The seconds are kept for the quickstart's report.
.venv/installed: requirements.txt pyproject.toml
	start=$$(date +%s) \
	&& $(PYTHON) -m venv .venv \
	&& $(BIN)/pip install --requirement requirements.txt \
	&& echo $$(( $$(date +%s) - start )) > $@

quickstart: setup
	MODEL=$(MODEL) PATH="$(CURDIR)/$(BIN):$$PATH" bash runs/quickstart.sh

test: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
