# `make train` and `make test` do all set-up; neither needs a GPU, nvcc or a C++ compiler.

METHOD ?= vi-simsiam
# Training of bench train; on a GPU better --data imagenette --size 128 --epochs 200
TRAIN ?= --data cifar10 --images 960 --epochs 4
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,$(if $(shell $(p) -c \
	'import sys; print(1 if (3, 11) <= sys.version_info < (3, 14) else "")' 2>/dev/null),$(p))))
# Use an environment that already has the dependencies: make gpu ENV=/path/to/venv INSTALLED=1
ENV ?= .venv
BIN := $(ENV)/bin
# Three on two cores: tests also wait, for processes that they start.
PYTEST := $(BIN)/python -m pytest -n 3 --dist worksteal
SOURCES := setup.py pyproject.toml constraints.txt $(wildcard csrc/*)

# Instruction sets of other processors, for torch, oneDNN, MKL, OpenBLAS, NumPy and the extension.
AVX2 := ATEN_CPU_CAPABILITY=avx2 DNNL_MAX_CPU_ISA=AVX2 MKL_CBWR=AVX2 OPENBLAS_CORETYPE=Haswell \
	NPY_DISABLE_CPU_FEATURES="X86_V4 AVX512_ICL AVX512_SPR" VI_SIMSIAM_SIMD=avx2
BASELINE := ATEN_CPU_CAPABILITY=default DNNL_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE \
	OPENBLAS_CORETYPE=Nehalem NPY_DISABLE_CPU_FEATURES="X86_V3 X86_V4 AVX512_ICL AVX512_SPR" \
	VI_SIMSIAM_SIMD=baseline
# Tests in which another rounding shows first.
NUMERICS := $(patsubst %,tests/test_%.py,augment batch_norm classifiers device_feed distributions \
	embed encoder extension linear models multiview_loss multiview_loss_autograd power_spherical \
	scores sgd small_map_convolution step)

.PHONY: train test install lint cpus soak matrix gpu bench clean

train: install
	$(BIN)/vi-simsiam train --method $(METHOD) --evaluate

test: install
	$(PYTEST)

install: $(if $(INSTALLED),,$(ENV)/.installed)

$(ENV)/.installed: $(SOURCES)
	@test -n "$(PYTHON)" || { echo "make: Python 3.11, 3.12 or 3.13 is needed; none was found" >&2; exit 1; }
	@echo "Setting up $(ENV) with $(PYTHON); the first time this downloads PyTorch."
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(ENV)
	@PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
		$(BIN)/python -m pip install --verbose --disable-pip-version-check --editable '.[dev]' \
		>$(ENV)/install.log 2>&1 || { tail -n 30 $(ENV)/install.log; exit 1; }
	@grep -o 'vi_simsiam: .*' $(ENV)/install.log || true
	@$(BIN)/vi-simsiam info
	@touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

cpus: install
	env $(AVX2) $(PYTEST) $(NUMERICS)
	env $(BASELINE) $(PYTEST) $(NUMERICS)

soak: install
	@status=0; run() { what=$$1; shift; echo "soak: $$what"; env "$$@" && verdict=passed || { verdict=FAILED; status=1; }; \
		summary="$$summary$$verdict: $$what\n"; }; \
	run 'long tests' $(BIN)/python -m pytest -m soak; \
	run 'all tests, this processor, one thread' $(PYTEST); \
	run 'all tests, this processor, two threads' OMP_NUM_THREADS=2 $(PYTEST); \
	run 'all tests, AVX2, two threads' $(AVX2) OMP_NUM_THREADS=2 $(PYTEST); \
	run 'all tests, baseline, one thread' $(BASELINE) $(PYTEST); \
	printf "\n$$summary"; exit $$status

matrix: install
	$(BIN)/python scripts/matrix.py $(CELLS)
	$(BIN)/vi-simsiam bench report README.md

gpu: install
	$(BIN)/python scripts/gpu.py $(if $(LIMIT),--seconds $(LIMIT)) $(STAGE)

bench: install
	$(BIN)/vi-simsiam bench loss --out benchmarks/results
	$(BIN)/vi-simsiam bench batch_norm --out benchmarks/results
	$(BIN)/vi-simsiam bench accuracy --out benchmarks/results
	$(BIN)/vi-simsiam bench augment --out benchmarks/results
	$(BIN)/vi-simsiam bench step --out benchmarks/results
	$(BIN)/vi-simsiam bench train $(TRAIN) --out benchmarks/results
	$(BIN)/vi-simsiam bench report README.md docs/*.md

clean:
	rm -rf $(ENV) build dist *.egg-info
