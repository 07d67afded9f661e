# radixkv: every target sets up what it needs. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin

all: check test  ## check, then test

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "radixkv needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

install: .venv/.installed  ## build .venv with everything at the development pins

demo: install  ## the main job: chat and repository questions, cache off and on
	$(BIN)/radixkv demo

test: install  ## all tests; fetches the test model once
	$(BIN)/radixkv model fetch smollm2
	$(BIN)/python -m pytest $(ARGS)

native: install  ## compile the core in place; `python hatch_build.py --clean` goes back to the source
	$(BIN)/python hatch_build.py

test-native: native  ## the core's tests against the compiled core
	$(BIN)/python -m pytest tests/core tests/policies tests/replay $(ARGS); status=$$?; \
	$(BIN)/python hatch_build.py --clean; exit $$status

check: install  ## lint, format, types, import rules; edits nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: install  ## let ruff repair what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install  ## every benchmark that runs without a GPU, five to fifteen minutes each
	$(BIN)/python hatch_build.py && $(BIN)/python -m bench.index; $(BIN)/python hatch_build.py --clean
	$(BIN)/python -m bench.index workloads --forms tokens,cursor
	$(BIN)/python -m bench.eviction
	$(BIN)/python -m bench.engine.view
	$(BIN)/python -m bench.engine.chat
	$(BIN)/python -m bench.engine.repository
	$(BIN)/python -m bench.engine.trees
	$(BIN)/python -m bench.serve.simulate
	$(BIN)/python -m bench.serve.load
	$(BIN)/python -m bench.serve.overhead

.venv-rivals/.installed: bench/rivals/requirements.txt
	$(PYTHON) -m venv .venv-rivals
	echo '*' > .venv-rivals/.gitignore
	.venv-rivals/bin/python -m pip install --quiet torch==2.13.0
	.venv-rivals/bin/python -m pip install --quiet --no-deps -r bench/rivals/requirements.txt
	touch $@

bench-rivals: install .venv-rivals/.installed  ## the index beside SGLang's, vLLM's and Dynamo's, from their wheels: 3 GB, half an hour
	$(BIN)/python hatch_build.py
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.rivals $(ARGS); $(BIN)/python hatch_build.py --clean

clean:  ## remove .venv and caches
	rm -rf .venv .venv-rivals .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

.PHONY: all install demo test native test-native check fix bench bench-rivals clean
