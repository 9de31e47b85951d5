# Two commands to know: `make run` and `make test`. `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev
BIN := $(VENV)/bin
HAVE = $(or $(wildcard $(BIN)/python),$(PYTHON))
RUNS ?= out
EXPERIMENT ?= lambda
INSTALLED := $(VENV)/installed-$(EXTRAS)

.PHONY: help install run test lint format bench bench-train bench-data bench-gpu verify-data audit soak study report constraints clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## make .venv with everything pinned; EXTRAS=dev,data,eval chooses extras

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

run: install ## train the default model on the embedded corpus, then sample from it
	$(BIN)/python train.py

test: install ## the whole test suite
	$(BIN)/python -m pytest

lint: install ## ruff check, ruff format, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install ## time the dispersion loss, the output head and checkpoints on this CPU; JSON under bench/results/
	$(BIN)/python -m bench.kernels
	$(BIN)/python -m bench.head
	$(BIN)/python -m bench.checkpoint

bench-train: install ## time whole training steps; BASELINE=<folder of a nanoGPT checkout> beside nanoGPT's
	$(BIN)/python -m bench.train_step $(if $(BASELINE),--baseline $(BASELINE))

bench-data: install ## time loader, sampling and, with TOKENIZER=<.tiktoken file> TEXT=<files>, preparation
	$(BIN)/python -m bench.loader
	$(BIN)/python -m bench.sampling
	$(if $(TOKENIZER),$(BIN)/python -m bench.prepare --tokenizer $(TOKENIZER) --text $(TEXT))

bench-gpu: ## kernels and steps on one GPU, correctness first; needs torch, triton and numpy alone
	$(HAVE) -m bench.kernels --device cuda
	$(HAVE) -m bench.train_step --device cuda --recipe gpt2 $(if $(BASELINE),--baseline $(BASELINE))

verify-data: install ## compare every byte of the prepared shards with their checksums
	$(BIN)/python -m nanodisp.data.shards $(patsubst %/manifest.json,%,$(wildcard data/*/*/manifest.json))

audit: install ## known weaknesses of the pinned packages; needs a network
	$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/python -m pip_audit --requirement constraints.txt --no-deps

soak: install ## kill runs, move them between ranks and corrupt their files; JSON under bench/results/
	$(BIN)/python -m bench.soak

study: install ## run an experiment and its report, or go on with it: make study EXPERIMENT=lambda
	$(BIN)/python train.py -m experiment=$(EXPERIMENT)
	$(BIN)/python -m nanodisp.report out/$(EXPERIMENT)

report: install ## tables, figures and one page of a folder of runs: make report RUNS=out/<sweep>
	$(BIN)/python -m nanodisp.report $(RUNS)

constraints: install ## resolve constraints.txt anew, for every supported Python
	$(BIN)/python -m pip install --quiet uv
	(echo '# The versions that nanodisp is tested with, for Python 3.10 to 3.13; made by `make constraints`.'; \
	 echo 'torch==2.13.0' | $(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.10 \
	   --no-header --no-annotate -c -) > constraints.new
	mv constraints.new constraints.txt

clean: ## delete runs and caches; prepared data stays
	rm -rf out .pytest_cache .ruff_cache .mypy_cache .hypothesis
