# make train: set up, then the main job on this machine.  make test: set up, then every check.
PYTHON ?= python3
BIN := .venv/bin
# one process per GPU, a power of two up to 8 so that the batch divides; without a GPU two processes on gloo
NPROC = $(shell n=$$(nvidia-smi -L 2>/dev/null | grep -c ^GPU); \
	p=1; while [ $$((2 * p)) -le $${n:-0} ] && [ $$p -lt 8 ]; do p=$$((2 * p)); done; \
	[ "$${n:-0}" -gt 0 ] && echo $$p || echo 2)
export OMP_NUM_THREADS ?= 1

.PHONY: train test lint clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

train: .venv/installed
	$(BIN)/python -m data.sample --out .cache/sample
	$(BIN)/torchrun --standalone --nproc-per-node $(NPROC) --shutdown_timeout 300 train.py --config configs/debug_parallax_muon.toml

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check
	$(BIN)/lint-imports

test: lint
	$(BIN)/pytest -m "not gpu and not multi_gpu and not slow and not network"

clean:
	rm -rf .venv .cache runs
