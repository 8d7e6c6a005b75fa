# Two commands do all the set-up: `make quickstart` and `make test`.
#
#   make quickstart   create .venv, install, run the main job on what the repository carries (no network)
#   make test         the same set-up, then the tests
#   make faults       the fault suite, and the table of docs/reliability.md (half an hour)
#   make lint         ruff, as a tool
#   make clean        remove what the targets above made

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

# Real models and data for the tests that want them; those tests are skipped without it.
ifneq ($(wildcard ../shared/assets),)
export QCOMPRESS_ASSETS ?= $(abspath ../shared/assets)
endif

.PHONY: quickstart test faults lint clean

quickstart: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/qcompress run recipes/quickstart.yaml --out runs

test: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

faults: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/faults -m '' -n auto --dist loadfile \
	    --reliability docs/reliability.md $(ARGS)

lint: $(READY)
	$(BIN)/python -m pip install -q 'ruff>=0.15'
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
# without hashes (deploy/requirements.txt has them): a machine may have a build of torch of its own
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[all,dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache build dist
