# Everything runs in .venv, built from pinned versions; a second call installs nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TRANSFORMERS4 := .venv-transformers4
LOWEST := .venv-lowest
RANKS ?= 2
# CUDA machines: make setup TORCH_INDEX=https://download.pytorch.org/whl/cu130; later calls keep the torch that is there.
TORCH_INDEX ?=
# One stamp for each index: naming another one installs torch anew.
STAMP := $(VENV)/.installed$(if $(TORCH_INDEX),-$(notdir $(TORCH_INDEX)))

export PATH := $(CURDIR)/$(BIN):$(PATH)
export OMP_NUM_THREADS ?= 1

.PHONY: help setup demo demo-seeds cures gpu-proof test transformers4 test-slow lowest test-lowest drills cluster-test lint tensorboard picture reference clean

help:
	@echo "make demo         train tiny_base, tiny_bico and tiny_ntp on $(RANKS) ranks, print and plot the comparison"
	@echo "make cures        train every objective and data-side cure from tiny_base, compare them, draw one picture"
	@echo "make gpu-proof    on a machine with a CUDA GPU: is it right, how fast; twice six minutes"
	@echo "make test         lint, type check and tests"
	@echo "make test-slow    the tests that take minutes"
	@echo "make test-lowest  the tests with the lowest releases that pyproject.toml allows (5 GB, built once)"
	@echo "make drills       kill, damage and resume drills"
	@echo "make cluster-test two SLURM nodes on this machine (root, Debian): launch, faults, refusals"
	@echo "make tensorboard  open the last runs"
	@echo "make reference    write docs/recipe.md and recipes/recipe.schema.json from the schema of recipes"
	@echo "make picture      take README's picture from the report of make demo (needs chromium)"
	@echo "make transformers4  an environment with transformers 4, for the tests of exports in make test-slow"
	@echo "make demo-seeds   the demo over 5 seeds (half an hour)"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools wheel numpy
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--force-reinstall --index-url $(TORCH_INDEX)) torch==2.13.0
	$(BIN)/python -m pip install --quiet --no-build-isolation -c constraints.txt -e .[dev]
	rm -f $(VENV)/.installed*
	touch $(VENV)/.installed $(STAMP)

demo: setup
	$(BIN)/python tools/demo.py --ranks $(RANKS)

demo-seeds: setup
	$(BIN)/python tools/demo.py --ranks $(RANKS) --seeds 11 12 13 14 15

cures: setup
	$(BIN)/python tools/cures.py --ranks $(RANKS)

gpu-proof: setup
	$(BIN)/python tools/gpu_proof.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The tests that start ranks come after the others. Two at a time, too: a run's ranks start, save and load one after the
# other for most of its time, and leave a core idle.
test: lint
	$(BIN)/pytest -m 'not distributed and not slow and not drill and not cluster' --numprocesses 2 --dist loadfile
	$(BIN)/pytest -m 'distributed and not slow and not drill and not cluster' --numprocesses 2 --dist loadfile

# Another transformers, for what must read our exports; it shares nothing with .venv.
transformers4: $(TRANSFORMERS4)/.installed

$(TRANSFORMERS4)/.installed: tests/transformers4.txt
	test -x $(TRANSFORMERS4)/bin/python || $(PYTHON) -m venv $(TRANSFORMERS4)
	$(TRANSFORMERS4)/bin/python -m pip install --quiet -r tests/transformers4.txt
	touch $@

test-slow: setup transformers4
	$(BIN)/pytest -m slow

# The lowest releases that pyproject.toml allows, torch's CUDA build among them; it shares nothing with .venv.
lowest: $(LOWEST)/.installed

$(LOWEST)/.installed: tests/lowest.txt pyproject.toml
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet -c tests/lowest.txt 'setuptools>=77,<82' wheel numpy
	$(LOWEST)/bin/python -m pip install --quiet -c tests/lowest.txt torch
	$(LOWEST)/bin/python -m pip install --quiet --no-build-isolation -c tests/lowest.txt -e .[dev]
	touch $@

test-lowest: export PATH := $(CURDIR)/$(LOWEST)/bin:$(PATH)
test-lowest: lowest
	pytest -m 'not distributed and not slow and not drill and not cluster' --numprocesses 2 --dist loadfile
	pytest -m distributed tests/distributed/test_end_to_end.py

cluster-test: setup
	$(BIN)/pytest -m cluster tests/cluster --verbose

drills: setup
	$(BIN)/pytest -m drill -s

tensorboard: setup
	$(BIN)/python tools/show_tensorboard.py runs

# As high as question, answer and the first two curves. As root chromium wants no sandbox; the page is our own.
picture:
	chromium --headless --no-sandbox --hide-scrollbars --force-color-profile=srgb --window-size=1200,1266 \
		--screenshot=docs/images/demo.png runs/demo/report.html

# In one step each: a command that fails leaves the file that was there.
reference: setup
	$(BIN)/bico-ds explain --markdown > docs/.recipe.md && mv docs/.recipe.md docs/recipe.md
	$(BIN)/bico-ds explain --json-schema > recipes/.schema && mv recipes/.schema recipes/recipe.schema.json

clean:
	rm -rf runs build .pytest_cache .mypy_cache .ruff_cache .hypothesis
