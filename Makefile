# `make demo` and `make test` set themselves up from a bare clone: Python >= 3.11 and make are all they need.

PYTHON ?= python3
BIN := .venv/bin
MODEL ?= cnn
RUN := runs/quickstart/demo-$(shell date +%Y%m%d-%H%M%S)

.PHONY: demo check test test-slow install clean

demo: install
	$(BIN)/python train.py configs/quickstart.yaml out=$(RUN)
	$(BIN)/python evaluate.py $(RUN) config=configs/eval/quickstart.yaml

# Before a commit: lint, types, what one small model promises, and the documents; in under 90 seconds on two cores.
check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 tests/test_architecture.py tests/test_docs.py \
		tests/contract/test_models.py tests/contract/test_explainers.py \
		-k "architecture or tables or stale or ((test_contract or test_target) and $(MODEL) and not bcnn)"

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto

test-slow: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto -m slow

install: .venv/.done

.venv/.done: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is too old, Python 3.11 or later is needed (make PYTHON=...)"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv -c constraints.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[demo,test]'
	@touch $@

clean:
	rm -rf .venv
