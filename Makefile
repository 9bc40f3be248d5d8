# make book | make test | make bench | make outputs | make mutate | make owner=NAME | make clean
SHELL := /bin/bash
.NOTPARALLEL:
PY ?= python3
V := .venv
export PATH := $(CURDIR)/$(V)/bin:$(PATH)
export PYTHONPATH := $(CURDIR)/nbs/_ext
unexport MPLBACKEND

ifdef owner
.DEFAULT_GOAL := owner
else
.DEFAULT_GOAL := help
endif
.PHONY: help book html test bench outputs mutate lock owner clean

help:
	@echo "make book        the book, in _build/html"
	@echo "make test        every check: export in sync, notebooks run, pytest"
	@echo "make bench       time the layers beside PyTorch's and Hugging Face's; ARGS=--help says what else (minutes)"
	@echo "make outputs     run the notebooks in place, keep their outputs, clean them (before a commit)"
	@echo "make mutate      plant generated bugs in the package, count those the tests kill (slow)"
	@echo "make owner=NAME  set the repository's owner in every file that names it"
	@echo "make clean       remove what was built (for a new environment, remove .venv too)"

# One environment for everything. torch goes first, pinned: a bare `torch` must never resolve.
$(V)/.ready: pyproject.toml constraints.txt
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "attn_nb needs Python >= 3.11; try make PY=python3.12"; exit 1; }
	@$(V)/bin/python -m pip --version >/dev/null 2>&1 || { echo "creating $(V)"; $(PY) -m venv --clear $(V); }
	@echo "installing the pinned packages into $(V) (a few minutes the first time)"
	$(V)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt "$$(grep ^torch== constraints.txt)"
	$(V)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

book: $(V)/.ready
	nbdev_export
	@$(MAKE) --no-print-directory html
	@echo; echo "The book is ready. Open: $(CURDIR)/_build/html/index.html"

html: $(V)/.ready
	python tools/warm_cache.py
	@rm -rf _build/.doctrees
	jupyter-book build . -W -n --keep-going --all -q

test: $(V)/.ready
	python tools/check_export.py
	ruff check -q
	OMP_NUM_THREADS=1 nbdev_test --timing     # notebooks run side by side, one thread each
	@$(MAKE) --no-print-directory html
	python -m pytest

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
