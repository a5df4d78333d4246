# `make train` and `make test` do all set-up; neither needs a GPU, nvcc or a C++ compiler.

METHOD ?= vi-simsiam
# What bench train trains on; on a GPU rather --data imagenette --size 128 --epochs 200
TRAIN ?= --data cifar10 --images 960 --epochs 4
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,$(if $(shell $(p) -c \
	'import sys; print(1 if (3, 11) <= sys.version_info < (3, 14) else "")' 2>/dev/null),$(p))))
# An environment that has the package's dependencies already can be used as it is: make gpu ENV=/path/to/venv INSTALLED=1
ENV ?= .venv
BIN := $(ENV)/bin
SOURCES := setup.py pyproject.toml constraints.txt $(wildcard csrc/*)

.PHONY: train test install lint soak gpu bench clean

train: install
	$(BIN)/vi-simsiam train --method $(METHOD) --evaluate

test: install
	$(BIN)/python -m pytest -n 2

install: $(if $(INSTALLED),,$(ENV)/.installed)

$(ENV)/.installed: $(SOURCES)
	@test -n "$(PYTHON)" || { echo "make: Python 3.11, 3.12 or 3.13 is needed; none was found" >&2; exit 1; }
	@echo "Setting up $(ENV) with $(PYTHON); the first time this downloads PyTorch."
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(ENV)
	@PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --verbose --disable-pip-version-check --editable '.[dev]' \
		>$(ENV)/install.log 2>&1 || { tail -n 30 $(ENV)/install.log; exit 1; }
	@grep -o 'vi_simsiam: .*' $(ENV)/install.log || true
	@$(BIN)/vi-simsiam info
	@touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

soak: install
	$(BIN)/python -m pytest -m soak

gpu: install
	$(BIN)/python -m pytest -m gpu
	$(BIN)/vi-simsiam bench loss --short --out benchmarks/results
	$(BIN)/vi-simsiam bench augment --short --out benchmarks/results
	$(BIN)/vi-simsiam bench step --short --out benchmarks/results
	$(BIN)/vi-simsiam bench train --short --size 128 --out benchmarks/results/short
	$(BIN)/vi-simsiam bench report README.md docs/*.md

bench: install
	$(BIN)/vi-simsiam bench loss --out benchmarks/results
	$(BIN)/vi-simsiam bench accuracy --out benchmarks/results
	$(BIN)/vi-simsiam bench augment --out benchmarks/results
	$(BIN)/vi-simsiam bench step --out benchmarks/results
	$(BIN)/vi-simsiam bench train $(TRAIN) --out benchmarks/results
	$(BIN)/vi-simsiam bench report README.md docs/*.md

clean:
	rm -rf $(ENV) build dist *.egg-info
