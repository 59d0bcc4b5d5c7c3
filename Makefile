# Everything runs in .venv, which the first call makes and later calls reuse.
PYTHON  ?= python3
BIN     := .venv/bin
READY   := .venv/.ready
QUIET   := PIP_DISABLE_PIP_VERSION_CHECK=1
TESTING := WSSS_PROFILE=smoke OMP_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help study test lab docs notebooks export badges readme clean preflight

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 14

study: $(READY)  ## the main job on the sample: tags in, masks out, a table and a picture
	$(BIN)/wsss study

test: $(READY)  ## every notebook as a test, then pytest
	$(TESTING) $(BIN)/python tests/notebooks.py
	$(TESTING) $(BIN)/python -m pytest -q -n 2 --dist loadfile --durations 12

lab: $(READY)  ## JupyterLab on the notebooks
	$(BIN)/jupyter lab --notebook-dir=nbs

docs: $(READY)  ## the documentation site in docs/_build/html
	$(BIN)/python docs/build.py

export: $(READY)  ## notebooks to modules
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean

badges: $(READY)  ## the Open-in-Colab badge of every notebook
	$(BIN)/python docs/badges.py

readme: $(READY)  ## README.md from nbs/index.ipynb
	$(BIN)/python docs/readme.py

NB ?= $(shell find nbs -name '*.ipynb' -not -path '*/.*' | sort)
notebooks: $(READY)  ## run every notebook (or NB=one.ipynb) with the sample profile and keep the outputs
	WSSS_PROFILE=sample PYTHONWARNINGS=ignore TQDM_DISABLE=1 $(BIN)/jupyter execute --inplace $(NB)
	$(BIN)/nbdev-clean

clean:  ## remove what the targets made (.venv stays; runs and data stay)
	rm -rf _proc _docs docs/_build build dist *.egg-info .pytest_cache .hypothesis .ruff_cache

# pydensecrf2 is compiled here. Its own build recipe asks for a Cython that Python 3.13 cannot compile; current Cython builds it on all.
$(READY): settings.ini setup.py pyproject.toml
	@$(MAKE) --no-print-directory preflight
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(QUIET) $(BIN)/python -m pip install -q 'cython>=3.0.11' setuptools wheel
	$(QUIET) $(BIN)/python -m pip install -q --no-build-isolation pydensecrf2
	$(QUIET) $(BIN)/python -m pip install -e '.[dev]'
	@touch $@

preflight:
	@command -v $(PYTHON) >/dev/null || { echo 'Python is missing. Debian, Ubuntu: apt install python3 python3-venv python3-dev'; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo '$(PYTHON) cannot make environments. Debian, Ubuntu: apt install python3-venv'; exit 1; }
	@$(PYTHON) -c 'import os, sysconfig as s; assert os.path.exists(s.get_path("include") + "/Python.h")' 2>/dev/null \
		|| { echo 'The headers of $(PYTHON) are missing. Debian, Ubuntu: apt install python3-dev'; exit 1; }
	@command -v g++ >/dev/null || { echo 'A C++ compiler is missing. Debian, Ubuntu: apt install build-essential'; exit 1; }
