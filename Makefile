# make book | make test | make bench | make outputs | make mutate | make owner=NAME | make clean
SHELL := /bin/bash
.NOTPARALLEL:
PY ?= python3
STAGE := @tools/stage.sh
V := .venv
F := .venv-floor
FLOOR_TESTS := $(addprefix tests/test_,$(addsuffix .py,modules single_head causal multi_head grouped_query kv_cache positions language_model))
export PATH := $(CURDIR)/$(V)/bin:$(PATH)
export PYTHONPATH := $(CURDIR)/nbs/_ext
unexport MPLBACKEND

ifdef owner
.DEFAULT_GOAL := owner
else
.DEFAULT_GOAL := help
endif
.PHONY: help book html test floor plant bench outputs mutate lock owner clean

help:
	@echo "make book        the book, in _build/html"
	@echo "make test        every check: export in sync, notebooks run, pytest"
	@echo "make bench       time the layers beside PyTorch's and Hugging Face's; ARGS=--help says what else (minutes)"
	@echo "make outputs     run the notebooks in place, keep their outputs, clean them (before a commit)"
	@echo "make floor       the quick tests and four chapters with the oldest torch, numpy and matplotlib that are allowed"
	@echo "make plant       plant every named bug again: who notices? (after large changes; minutes)"
	@echo "make mutate      plant generated bugs in the package, count those the tests kill (slow)"
	@echo "make owner=NAME  set the repository's owner in every file that names it"
	@echo "make clean       remove what was built (for a new environment, remove .venv too)"

# One environment for everything. torch goes first, pinned: a bare `torch` must never resolve.
$(V)/.ready: pyproject.toml constraints.txt
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "attn_nb needs Python >= 3.11; try make PY=python3.12"; exit 1; }
	@$(V)/bin/python -m pip --version >/dev/null 2>&1 || { echo "creating $(V)"; $(PY) -m venv --clear $(V); }
	@echo "installing the pinned packages into $(V) (a few minutes the first time)"
	$(STAGE) "install" $(V)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt "$$(grep ^torch== constraints.txt)"
	$(STAGE) "install" $(V)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

book: $(V)/.ready
	nbdev_export
	@$(MAKE) --no-print-directory html
	@echo; echo "The book is ready. Open: $(CURDIR)/_build/html/index.html"

html: $(V)/.ready
	$(STAGE) "notebooks" python tools/warm_cache.py
	$(STAGE) "pages" python tools/build_pages.py

# Each notebook runs once: the run that the pages show is its test. One notebook alone: nbdev_test --path nbs/01_single_head.ipynb
test: $(V)/.ready
	$(STAGE) "export" python tools/check_export.py
	$(STAGE) "lint" ruff check -q
	@$(MAKE) --no-print-directory html
	$(STAGE) "tests, side by side" env OMP_NUM_THREADS=1 python -m pytest -n auto --dist worksteal -m "not (browser or planted)"
	$(STAGE) "tests, browser" env OMP_NUM_THREADS=1 python -m pytest -n auto --dist worksteal -m browser
	$(STAGE) "planted bugs" python -m pytest -m planted

# The oldest versions that pyproject.toml allows. Their torch for Linux comes with libraries for GPUs: 7 GB in all.
$(F)/.ready: constraints-floor.txt
	@$(PY) -m venv --clear $(F)
	$(STAGE) "install, oldest versions" $(F)/bin/python -m pip install -q --disable-pip-version-check -r constraints-floor.txt
	@touch $@

floor: $(F)/.ready
	$(STAGE) "tests, oldest versions" env OMP_NUM_THREADS=1 $(F)/bin/python -m pytest -n auto --dist worksteal -m "not slow or floor" $(FLOOR_TESTS)
	$(STAGE) "chapters, oldest versions" env OMP_NUM_THREADS=1 $(F)/bin/python tests/run_chapter.py language_model single_head multi_head kv_cache

plant: $(V)/.ready
	python tests/planted.py --all

bench: $(V)/.ready
	@python -m benchmarks $(ARGS)

outputs: $(V)/.ready
	nbdev_export
	python tools/run_inplace.py $(NB)

mutate: $(V)/.ready
	@python -c "import cosmic_ray" 2>/dev/null || python -m pip install -q -c constraints.txt -e ".[mutate]"
	python tools/mutate.py

lock:
	python3 tools/lock.py

owner:
	$(PY) tools/set_owner.py $(owner)

clean:
	rm -rf _build build dist *.egg-info
