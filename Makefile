# Two commands do everything: `make demo`, `make test`. Both make their own environment in .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA ?=
# No key, no network: wandb writes its runs to disk unless told otherwise.
export WANDB_MODE ?= offline
# OpenMP threads that sleep while they wait do not slow each other down on shared cores.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help install demo test test-all bench check format clean
.DEFAULT_GOAL := help

help:  ## show this
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("medclip needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[hf,wandb,cloud,ray,zarr,lora,onnx,serve,slurm,dev]'
	@touch $@

install: $(VENV)/.installed  ## environment only

demo: install  ## the whole way on generated data, or on your own pairs with DATA=folder (runs/demo/report.html)
	$(BIN)/medclip demo overwrite=true $(if $(DATA),data_folder='$(DATA)')

test: install  ## the tests, at most 15 minutes on two cores
	scripts/ensure_chromium.sh
	$(BIN)/python -m pytest -m 'not slow' -n 2 --dist loadfile

test-all: install  ## the slow ones too
	scripts/ensure_chromium.sh
	$(BIN)/python -m pytest -n 2 --dist loadfile

bench: install  ## every benchmark, ours against the peer in one run
	@for file in scripts/bench/[a-z]*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

check: install  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: install  ## let ruff rewrite
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and caches, never runs/
	rm -rf $(VENV) .pytest_cache .ruff_cache build dist
