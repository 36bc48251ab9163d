# Each target does all of its own set-up and skips what is done already.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-fast check sanitize bench bars gpu browser clean

demo: $(READY)
	$(BIN)/sv3d-fast run examples/armchair.png -o out/demo

# Files side by side, one on each core (more than four would fill the memory of small machines), each with one thread, in
# their order: by the number of their tests, the slowest files would come last.
PARALLEL := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile \
	--no-loadscope-reorder

test: $(READY) browser
	$(PARALLEL)

test-fast: $(READY) browser
	$(PARALLEL) -m "not slow"

# Debian's browser and its driver, for the tests that look at pages; installed where that is allowed.
BROWSER := chromium chromium-driver fonts-dejavu-core

browser:
	@command -v chromium > /dev/null && command -v chromedriver > /dev/null || { \
		test "$$(id -u)" = 0 && command -v apt-get > /dev/null || { \
			echo "the tests need chromium and chromedriver: apt-get install $(BROWSER)" >&2; exit 1; }; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
			apt-get install -y -qq --no-install-recommends $(BROWSER) > /dev/null; }

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*
	$(BIN)/mypy
	$(BIN)/hadolint deploy/Dockerfile

# The native CPU code under the address and undefined-behaviour sanitizers, in under three minutes. Python itself leaks,
# so leaks don't count; libstdc++ goes in first too, or else exceptions are not seen coming.
SANITIZED := build/sanitize
NATIVE_TESTS := $(patsubst %,tests/test_%.py,marching_cubes mesh_raster splat_raster ssim tsdf)

sanitize: $(READY)
	$(BIN)/cmake -S . -B $(SANITIZED) -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
		-DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -DSV3D_FAST_SANITIZE=address,undefined \
		-DSV3D_FAST_OUTPUT=$(CURDIR)/$(SANITIZED)/native
	$(BIN)/cmake --build $(SANITIZED) --target sv3d_fast_cpu
	SV3D_FAST_NATIVE=$(CURDIR)/$(SANITIZED)/native LD_PRELOAD="$(foreach l,asan stdc++,$$($(CXX) -print-file-name=lib$(l).so))" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
		$(BIN)/python -m pytest $(NATIVE_TESTS)

# what every op takes on its largest example, by implementation
OP_BENCH := bench/test_ops.py -o addopts= -q --benchmark-columns=median,iqr --benchmark-sort=name

bench: $(READY)
	$(BIN)/python -m bench
	$(BIN)/python -m pytest $(OP_BENCH)

bars: $(READY)
	$(BIN)/python -m bench.bars

# The tests and benches of a machine with a GPU, in under nine minutes; uses the torch that is installed there.
gpu:
	$(PYTHON) -m pytest -m gpu
	$(PYTHON) -m pytest $(OP_BENCH)
	$(PYTHON) -m bench.engine
	$(PYTHON) -m bench.memory
	$(PYTHON) -m bench.triposr
	$(PYTHON) -m bench.mesh_raster
	$(PYTHON) -m bench.scene_kernels
	$(PYTHON) -m bench.splat_raster --device cuda

clean:
	rm -rf build out sv3d_fast/native $(VENV) *.egg-info

# modules are compiled when they are first imported: most of those that come along never are
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check --no-compile -c constraints.txt

$(READY): pyproject.toml constraints.txt setup.py CMakeLists.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "setuptools>=77" wheel cmake ninja torch apache-tvm-ffi meshoptimizer
	$(PIP) --no-build-isolation -e ".[test,test-formats,test-pages,dev]"
	touch $(READY)
