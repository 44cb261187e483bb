# make train: set up, then the main job on this machine.  make test: set up, then every check.
PYTHON ?= python3
BIN := .venv/bin
# one process per GPU; without a GPU two processes on gloo
NPROC := $(shell n=$$(nvidia-smi -L 2>/dev/null | grep -c ^GPU); [ "$${n:-0}" -gt 0 ] && echo $$n || echo 2)
# about 32 rows a step, 4 at a time on each process
ROWS := $(shell echo $$((4 * $(NPROC) * ((8 + $(NPROC) - 1) / $(NPROC)))))
export OMP_NUM_THREADS ?= 1

.PHONY: train test test-half test-rest test-faults test-gpu lint clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

train: .venv/installed
	$(BIN)/python -m data.sample --out .cache/sample
	$(BIN)/torchrun --standalone --nproc-per-node $(NPROC) --shutdown_timeout 300 train.py \
		--config configs/debug_parallax_muon.toml --training.global_batch_size $(ROWS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check
	$(BIN)/lint-imports

PYTEST := $(BIN)/pytest -m "not gpu and not multi_gpu and not slow and not network"

# about half of the time of all tests
HALF := tests/parallax tests/training

# side by side: most tests take one core, and two runs of two threads each on two cores wait for each other
test-half test-rest: export OMP_NUM_THREADS := 1
test: lint
	$(MAKE) --no-print-directory --jobs 2 $(if $(filter output-sync,$(.FEATURES)),--output-sync) \
		test-half test-rest

test-half: .venv/installed
	$(PYTEST) $(HALF)

test-rest: .venv/installed
	$(PYTEST) tests $(HALF:%=--ignore %)

# kills, two launches, damaged checkpoints, full disks: all of tests/faults, the slow ones too
test-faults: .venv/installed
	$(BIN)/pytest -m "not gpu and not multi_gpu and not network" tests/faults

# on one GPU; a worker gets tests that stand together, which share compiled kernels
test-gpu: .venv/installed
	$(BIN)/pytest -m "gpu and not multi_gpu" -n 14 --dist worksteal --durations 40

clean:
	rm -rf .venv .cache runs
