# The two commands to know are `make run` and `make test`. `make help` lists the others.

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev
BIN := $(VENV)/bin
HAVE = $(or $(wildcard $(BIN)/python),$(PYTHON))
RUNS ?= out
EXPERIMENT ?= lambda
JOBS ?= 2
MINUTES ?= 9
HOURS ?= 3
INSTALLED := $(VENV)/installed-$(EXTRAS)

.PHONY: help install run test test-fast mutants lint format bench bench-train bench-data bench-gpu gpu-wheels verify-data
.PHONY: audit soak slurm-test hosts-test endurance study study-gpu study-report report constraints clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## create .venv with pinned packages; EXTRAS=dev,data,eval chooses the extras

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

run: install ## train the default model on the standard library's text, then sample from it
	$(BIN)/python train.py

test: install ## run all tests, in JOBS processes (JOBS=0: in one, as `pytest` alone does)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

test-fast: install ## run the tests that start no process and no compiler: under two minutes on two cores
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow"

mutants: install ## plant small bugs in the code and list those that no test catches
	$(BIN)/python -m tests.mutants

lint: install ## run ruff check, ruff format --check and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install ## fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install ## time the dispersion loss, the output head and checkpoints on this CPU; JSON in bench/results/
	$(BIN)/python -m bench.kernels
	$(BIN)/python -m bench.head
	$(BIN)/python -m bench.checkpoint

bench-train: install ## time complete training steps; BASELINE=<nanoGPT checkout> compares with nanoGPT
	$(BIN)/python -m bench.train_step $(if $(BASELINE),--baseline $(BASELINE))

bench-data: install ## time loader and sampling; with TOKENIZER=<.tiktoken file> TEXT=<files> also data preparation
	$(BIN)/python -m bench.loader
	$(BIN)/python -m bench.sampling
	$(if $(TOKENIZER),$(BIN)/python -m bench.prepare --tokenizer $(TOKENIZER) --text $(TEXT))

bench-gpu: ## check, then time kernels and steps on one GPU; run it again for what is missing; needs only torch, triton and numpy
	$(HAVE) -m bench.gpu smoke
	-$(HAVE) -m bench.kernels --device cuda
	$(HAVE) -m bench.gpu step-16 step-32 $(if $(BASELINE),--baseline $(BASELINE)) --seconds 120

gpu-wheels: ## build the wheels that train.py and pytest need beside torch, triton and numpy, for a machine without a network
	$(PYTHON) -m pip wheel --quiet --disable-pip-version-check -c constraints.txt --wheel-dir gpu-wheels \
	  hydra-core rich tiktoken safetensors jinja2 pytest hypothesis

verify-data: install ## verify the checksums of all prepared shards
	$(BIN)/python -m nanodisp.data.shards $(patsubst %/manifest.json,%,$(wildcard data/*/*/manifest.json))

audit: install ## list known vulnerabilities of the pinned packages; needs a network
	$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/python -m pip_audit --requirement constraints.txt --no-deps

soak: install ## kill runs, change their number of ranks, corrupt their files; JSON in bench/results/
	$(BIN)/python -m bench.soak

slurm-test: ## train under a real SLURM on this machine: time limits, cancelled jobs, a lost node; needs root
	$(MAKE) --no-print-directory install EXTRAS=dev,slurm
	$(BIN)/python -m bench.cluster.slurm

hosts-test: install ## train on several hosts (network namespaces) that fail, and on disks that do; needs root
	$(BIN)/python -m bench.cluster.hosts
	$(BIN)/python -m bench.cluster.disks

endurance: install ## train the default model for HOURS=3, with kills: memory, file handles and disk must not grow
	$(BIN)/python -m bench.endurance hours=$(HOURS)

study: install ## run or resume an experiment and write its report: make study EXPERIMENT=lambda
	$(BIN)/python train.py -m experiment=$(EXPERIMENT)
	$(BIN)/python -m nanodisp.report out/$(EXPERIMENT)

study-gpu: ## the study's larger sizes on one GPU, for MINUTES; again to resume: make study-gpu CORPUS=<folder>
	$(HAVE) -m bench.study run --gpu --corpus $(CORPUS) --minutes $(MINUTES)

study-report: install ## the study's tables from its records, into docs/study/results.md
	$(BIN)/python -m bench.study.report

report: install ## write tables, figures and a page about a folder of runs: make report RUNS=out/<sweep>
	$(BIN)/python -m nanodisp.report $(RUNS)

constraints: install ## resolve constraints.txt again, for every supported Python
	$(BIN)/python -m pip install --quiet uv
	(echo '# The versions that nanodisp is tested with, for Python 3.10 to 3.13; made by `make constraints`.'; \
	 echo 'torch==2.13.0' | $(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.10 \
	   --no-header --no-annotate -c -) > constraints.new
	mv constraints.new constraints.txt

clean: ## delete runs and caches, but not prepared data
	rm -rf out .pytest_cache .ruff_cache .mypy_cache .hypothesis
