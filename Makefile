# Two commands take a fresh machine to a chatting model and to a tested one: `make quickstart`, `make test`.
PYTHON ?= python3
MODEL ?= quickstart
BIN := .venv/bin

.PHONY: setup quickstart alignment chat test check lint imports docs

setup: .venv/installed

# The file holds the seconds that the installation took, for the quickstart's report.
.venv/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "error: $(PYTHON) is older than Python 3.11; name another: make setup PYTHON=python3.11" >&2; exit 2; }
	start=$$(date +%s) \
	&& $(PYTHON) -m venv .venv \
	&& $(BIN)/pip install --requirement requirements.txt \
	&& echo $$(( $$(date +%s) - start )) > $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(BIN)/pip install --requirement requirements-dev.txt
	touch $@

quickstart: setup
	MODEL=$(MODEL) PATH="$(CURDIR)/$(BIN):$$PATH" bash runs/quickstart.sh

alignment: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" bash runs/alignment.sh

# MODEL=FOLDER names the checkpoint; without it, the newest finished run answers.
chat: setup
	$(BIN)/python runs/chat_page.py $(if $(filter-out file,$(origin MODEL)),--models $(MODEL))

# Two processes with one thread each: two threads gain little on the small models of the tests. tests/conftest.py orders
# the files.
test: setup
	OMP_NUM_THREADS=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

# Before every commit: lint and the tests that are not marked slow, in under two minutes on two cores.
check: lint
	OMP_NUM_THREADS=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pytest -n 2 --dist loadfile -m "not slow"

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Does every import of ours exist, as an editor sees it? Half a minute, but in a new environment it may take ten.
imports: .venv/installed-dev
	$(BIN)/pyright --project . --level error  # a pyrightconfig.json in a folder above would win over pyproject.toml

# The documentation site. Search needs a server: .venv/bin/python -m http.server --directory outputs/docs
docs: .venv/installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "wrote outputs/docs: open index.html in a browser"
