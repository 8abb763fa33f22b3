# Set-up and the everyday commands; `make` alone explains them. POSIX sh, GNU make 3.81 or newer.

# The environments. Only the first is needed to train, evaluate, predict and develop.
VENV := .venv
PEERS := .venv-peers
TPU := .venv-tpu
TENSORFLOW := .venv-tensorflow
DOCS := .venv-docs
BIN := $(VENV)/bin
DEMO := runs/digits
SCENES := runs/digit_scenes
BOXES := runs/digit_boxes
# The page of `make demo-web`, and where it is served.
PAGE := runs/digits_page
PORT ?= 8000

# The first of these that runs is used; `make PYTHON=/path/to/python3.12 ...` chooses.
PYTHON ?= python3.11 python3.12 python3.13 python3.14 python3
# Processes that share the tests: one more than 2 cores, since many a test waits for commands
# that it starts. Each test module stays in one, with what it compiled; the order is that of
# tests/conftest.py.
TEST_WORKERS ?= 3
UV := uv==0.13.9
# The photos of `make bench-input` and `make bench-export`: a folder, searched with what is below it.
PHOTOS ?=
# The weights of `make bench-transfer` and `make bench-export`, and the archives of the first: see
# `python -m benchmarks.transfer --help`.
WEIGHTS ?=
DATA ?=

PYTEST = -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder
LOCKED := setup.cfg pyproject.toml requirements/build.txt requirements/lock.txt scripts/install.sh

.DELETE_ON_ERROR:
.PHONY: help venv venv-peers venv-tensorflow demo demo-detection demo-segmentation demo-web \
    test test-peers test-slow test-tensorflow test-tpu fuzz golden \
    bench-cpu bench-gpu bench-startup bench-input bench-transfer bench-detection bench-export docs lint \
    format lock clean

help:
	@cat scripts/help.txt

venv: $(VENV)/.installed
venv-peers: $(PEERS)/.installed
venv-tensorflow: $(TENSORFLOW)/.installed

$(VENV)/.installed: $(LOCKED)
	@test -x $(BIN)/python || scripts/make_venv.sh $(VENV) $(PYTHON)
	@echo 'installing requirements/lock.txt into $(VENV): 1 to 2 minutes, about 1.2 GB'
	@scripts/install.sh $(VENV) requirements/lock.txt --project
	@touch $@

$(PEERS)/.installed: $(LOCKED) requirements/peers.txt
	@test -x $(PEERS)/bin/python || scripts/make_venv.sh $(PEERS) $(PYTHON)
	@echo 'installing the peers (torch, timm, mmpretrain, keras, ...) into $(PEERS): some minutes'
	@scripts/install.sh $(PEERS) requirements/lock.txt --project --peers
	@touch $@

# What writes and runs ONNX files, of the versions that the tests have; the lock has what they need.
$(VENV)/.installed-onnx: $(VENV)/.installed requirements/peers.txt
	@$(BIN)/python -m pip install --quiet --no-deps --disable-pip-version-check \
	    $$(grep -E '^onnx(runtime)?==' requirements/peers.txt)
	@touch $@

# Beside libtpu, which needs no TPU to compile, jax prints warnings: the other environments lack it.
$(TPU)/.installed: $(LOCKED) scripts/install_libtpu.sh
	@test -x $(TPU)/bin/python || scripts/make_venv.sh $(TPU) $(PYTHON)
	@echo 'installing requirements/lock.txt and libtpu into $(TPU): 2 minutes, about 2 GB'
	@scripts/install.sh $(TPU) requirements/lock.txt --project
	@scripts/install_libtpu.sh $(TPU)
	@touch $@

# Nothing that trains may lean on TensorFlow.
$(TENSORFLOW)/.installed: setup.cfg requirements/build.txt requirements/tensorflow.txt scripts/install.sh
	@test -x $(TENSORFLOW)/bin/python || scripts/make_venv.sh $(TENSORFLOW) $(PYTHON)
	@echo 'installing TensorFlow, TFDS and the package into $(TENSORFLOW): 2 minutes, about 3 GB'
	@scripts/install.sh $(TENSORFLOW) requirements/tensorflow.txt --project
	@touch $@

# The package as well, whose docstrings become pages.
$(DOCS)/.installed: setup.cfg requirements/build.txt requirements/docs.txt scripts/install.sh
	@test -x $(DOCS)/bin/python || scripts/make_venv.sh $(DOCS) $(PYTHON)
	@echo 'installing Sphinx and the package into $(DOCS): 1 to 2 minutes, about 1.2 GB'
	@scripts/install.sh $(DOCS) requirements/docs.txt --project
	@touch $@

demo: venv
	@scripts/demo.sh $(BIN)/python $(DEMO) digits

demo-detection: venv
	@scripts/demo.sh $(BIN)/python $(BOXES) digit_scenes_detection

demo-segmentation: venv
	@scripts/demo.sh $(BIN)/python $(SCENES) digit_scenes_segmentation

demo-web: $(VENV)/.installed-onnx
	@scripts/demo_web.sh $(BIN)/python $(DEMO) $(PAGE) $(PORT)

test: lint
	$(BIN)/python $(PYTEST)

test-peers: venv-peers
	@command -v "$${CHROMIUM:-chromium}" > /dev/null || echo "no Chromium, and so no tests of \
	--to=web's page: apt-get install chromium, or set CHROMIUM to its path"
	$(PEERS)/bin/python $(PYTEST) -m 'peers and not slow' tests/parity

test-slow: venv-peers
	$(PEERS)/bin/python -m pytest -m slow

test-tensorflow: venv venv-tensorflow
	$(BIN)/python -m pytest -m tensorflow

test-tpu: $(TPU)/.installed
	$(TPU)/bin/python -m pytest -m tpu tests/training/test_compile.py

# COUNT=100 takes a tenth of the time.
fuzz: venv-peers
	$(PEERS)/bin/python -m tests.fuzz $(if $(COUNT),--count=$(COUNT))

# The peers' results in tests/golden/, which `make test` compares with.
golden: venv-peers
	$(PEERS)/bin/python -m tests.golden.make

# Quiet machines measure best. Each writes a CSV in benchmarks/.
bench-cpu: venv-peers
	$(PEERS)/bin/python -m benchmarks.cpu

bench-gpu: venv-peers
	$(PEERS)/bin/python -m benchmarks.gpu

bench-startup: venv-peers
	$(PEERS)/bin/python -m benchmarks.startup

bench-export: venv-peers
	@test -n "$(WEIGHTS)" -a -n "$(PHOTOS)" || { echo 'error: make bench-export WEIGHTS=PTH PHOTOS=DIR' >&2; exit 1; }
	$(PEERS)/bin/python -m benchmarks.export --weights="$(WEIGHTS)" --photos="$(PHOTOS)"

bench-detection: venv
	$(BIN)/python -m benchmarks.detection

bench-transfer: venv-peers
	@test -n "$(WEIGHTS)" -a -n "$(DATA)" || { echo 'error: make bench-transfer WEIGHTS=PTH DATA=DIR' >&2; exit 1; }
	$(PEERS)/bin/python -m benchmarks.transfer --weights="$(WEIGHTS)" --data="$(DATA)"

bench-input: venv-peers venv-tensorflow
	@test -n "$(PHOTOS)" || { echo 'error: make bench-input PHOTOS=DIR, a folder of photos' >&2; exit 1; }
	$(PEERS)/bin/python -m benchmarks.input_pipeline --photos="$(PHOTOS)" \
	    --tensorflow-python=$(TENSORFLOW)/bin/python

# Warnings are errors, and every one is reported before it fails.
docs: $(DOCS)/.installed
	$(DOCS)/bin/python -m sphinx -q -W --keep-going -n -c docs . build/docs
	@echo 'The pages: build/docs/index.html'

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: .venv-lock/bin/uv
	@scripts/compile_locks.sh $< $(UPGRADE)

.venv-lock/bin/uv:
	@scripts/make_venv.sh .venv-lock $(PYTHON)
	@.venv-lock/bin/python -m pip install --disable-pip-version-check --quiet $(UV)

clean:
	rm -rf $(VENV) $(PEERS) $(TPU) $(TENSORFLOW) $(DOCS) .venv-lock
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
