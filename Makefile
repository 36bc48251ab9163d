# Each target does all of its own set-up and skips what is done already.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-fast check bench bars gpu clean

demo: $(READY)
	$(BIN)/sv3d-fast run examples/armchair.png -o out/demo

test: $(READY)
	$(BIN)/python -m pytest

test-fast: $(READY)
	$(BIN)/python -m pytest -m "not slow"

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m bench

bars: $(READY)
	$(BIN)/python -m bench.bars

# The tests and benches of a machine with a GPU, in under nine minutes; uses the torch that is installed there.
gpu:
	$(PYTHON) -m pytest -m gpu
	$(PYTHON) -m bench.engine
	$(PYTHON) -m bench.mesh_raster
	$(PYTHON) -m bench.splat_raster --device cuda

clean:
	rm -rf build out sv3d_fast/native $(VENV) *.egg-info

$(READY): pyproject.toml constraints.txt setup.py CMakeLists.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt "setuptools>=77" wheel cmake ninja \
		torch apache-tvm-ffi meshoptimizer
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[test,dev]"
	touch $(READY)
