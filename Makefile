# Every target sets up .venv by itself the first time, from nothing but python3, pip and make.
#   make PYTHON=python3.13 VENV=.venv-3.13 test    another Python, beside the first

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
RUN := $(VENV)/bin/python
MINOR := $(shell $(PYTHON) -c 'import sys; print("3.%d" % sys.version_info[1])')
# The exact versions that were tested: Python 3.11 has a file of its own, since newer JAX left it.
PINS := constraints/$(if $(filter 3.11,$(MINOR)),python3.11,newest).txt

.PHONY: train test test-slow test-long check bench clean

train: $(VENV)/.ready
	$(RUN) -m experiments.digits train

test: $(VENV)/.ready
	$(RUN) -m pytest -m "not slow and not long" $(ARGS)

test-slow: $(VENV)/.ready
	$(RUN) -m pytest -m "slow and not long" $(ARGS)

test-long: $(VENV)/.ready
	$(RUN) -m pytest -m long $(ARGS)

check: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(RUN)

# Every reference workload against PyTorch, which is installed for it; about 40 minutes on two cores.
# Where your pip would take a build for CUDA, install the CPU build of PyTorch into $(VENV) yourself first.
bench: $(VENV)/.ready
	$(RUN) -c "import torch" 2>/dev/null || $(RUN) -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(RUN) -m benchmarks.throughput $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info

$(VENV)/.ready: pyproject.toml $(PINS)
	$(PYTHON) -c 'import sys; sys.exit("jaxnets needs Python 3.11 or newer, not %d.%d" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint $(PINS) --editable '.[dev]'
	touch $@
