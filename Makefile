# Set-up and the everyday commands; `make` alone explains them. POSIX sh, GNU make 3.81 or newer.

VENV := .venv
BIN := $(VENV)/bin
CORE := $(VENV)/.installed-core
PEERS := $(VENV)/.installed-peers
BENCH := $(VENV)/.installed-bench
# TensorFlow and TFDS's command, in an environment of their own (docs/imagenet.md).
TF := .venv-tensorflow
TENSORFLOW := $(TF)/.installed
# The TPU's compiler, which needs no TPU.
LIBTPU := $(VENV)/.installed-libtpu
LOCKS := $(wildcard requirements/py3*.txt)
DEMO := runs/digits

# The first of these that runs and has a lock is used; `make PYTHON=/path/to/python3.12 ...` chooses.
PYTHON ?= python3.11 python3.12 python3.13 python3.14 python3
# Processes that share the tests. Each test module stays in one, with what it compiled.
TEST_WORKERS ?= 2
UV := uv==0.13.9
# The photos of `make bench-input`: a folder of image files, searched with what is below it.
PHOTOS ?=

# The lock of the Python in $(VENV), as a shell expression.
LOCK = requirements/py$$($(BIN)/python -c 'import sys; print("%d%d" % sys.version_info[:2])').txt
# pip shows its progress to a person, and only its complaints to a log.
PIP_INSTALL = $(BIN)/python -m pip install --no-compile --disable-pip-version-check \
    $$(test -t 1 || echo --quiet)
# What was installed, on all cores, which pip doesn't; some files are of other Pythons or templates.
COMPILE = $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true

.DELETE_ON_ERROR:
.PHONY: help venv venv-tensorflow demo test test-slow test-tensorflow test-tpu bench-cpu bench-gpu bench-startup bench-input lint format lock clean

help:
	@echo 'Usage: make TARGET [PYTHON=/path/to/python]'
	@echo
	@echo '  demo             train on handwritten digits, evaluate, predict: about 3 minutes on 2 cores'
	@echo '  test             linter, type checker and tests, against the real PyTorch models'
	@echo '  test-slow        the tests that take minutes each, which `make test` leaves out'
	@echo '  test-tensorflow  the tests that run TFDS with TensorFlow, in an environment of its own'
	@echo '  test-tpu         compiles the TPU recipe for TPU slices (x86-64 Linux; no TPU needed)'
	@echo '  bench-cpu        images per second on this CPU beside torch, Keras and others: half an hour'
	@echo '  bench-gpu        the same on an NVIDIA GPU, beside torch and timm'
	@echo '  bench-startup    seconds to the first prediction and to the first training step'
	@echo '  bench-input      the input pipeline beside its peers: make bench-input PHOTOS=DIR'
	@echo '  lint             linter, formatter (checking only) and type checker'
	@echo '  format           let the formatter and the linter mend what they can'
	@echo '  venv             only the set-up: $(VENV) with the locked packages and this one, editable'
	@echo '  venv-tensorflow  only that environment, $(TF): prepares ImageNet (docs/imagenet.md)'
	@echo '  lock             compile the locks in requirements/ anew (UPGRADE=--upgrade: newer versions)'
	@echo '  clean            remove $(VENV), $(TF), caches and build outputs; runs/ stays'
	@echo
	@echo 'Each target sets up what it needs first. Python 3.11 or newer is all it takes.'

venv: $(CORE)

# A Python counts when it runs (a pyenv shim may exist and fail), has a lock, and can make a venv.
$(BIN)/python:
	@for python in $(PYTHON); do \
	    version=$$("$$python" -c 'import ensurepip, sys; print("%d%d" % sys.version_info[:2])' \
	        2>/dev/null) && test -f "requirements/py$$version.txt" || continue; \
	    echo "making $(VENV) with $$("$$python" --version)"; \
	    "$$python" -m venv --clear $(VENV) && exit 0; \
	    rm -rf $(VENV); exit 1; \
	done; \
	echo 'error: no usable Python: tried $(PYTHON).' >&2; \
	echo '  Needed: Python with its venv module (Debian, Ubuntu: package python3-venv), of a version' >&2; \
	echo '  that has a lock here:' $(LOCKS:requirements/%.txt=%)'. Name one: make PYTHON=/path/to/python' >&2; \
	exit 1

# setuptools comes first and from its own lock, so that nothing is built with a version pip picks:
# one package (promise) has no wheel, and this one is installed from its source.
$(CORE): setup.cfg pyproject.toml requirements/build.txt $(LOCKS) | $(BIN)/python
	@lock=$(LOCK); test -f "$$lock" || { \
	    echo "error: there is no $$lock for $(VENV)'s $$($(BIN)/python --version); run make clean" >&2; exit 1; }; \
	echo "installing $$lock into $(VENV): 1 to 2 minutes, about 1.2 GB"; set -e; \
	$(PIP_INSTALL) --require-hashes -r requirements/build.txt; \
	$(PIP_INSTALL) --require-hashes --no-build-isolation --use-pep517 -r "$$lock"; \
	$(PIP_INSTALL) --no-deps --no-build-isolation --editable .; \
	$(COMPILE)
	@touch $@

# torch brings what it needs (for a CUDA build that is a lot), but may change no version of the lock;
# the others ask for packages that would (opencv with a GUI), so they come without dependencies.
$(PEERS): requirements/peers.txt $(CORE)
	@echo 'installing the peers (torch, torchvision, timm, mmpretrain, keras, ...): some minutes'; set -e; \
	sed -n 's/^\([^ #]*==[^ ;]*\).*/\1/p' $(LOCK) > $(VENV)/lock-pins.txt; \
	$(PIP_INSTALL) -c $(VENV)/lock-pins.txt -c requirements/peers.txt \
	    $$(grep '^torch==' requirements/peers.txt); \
	$(PIP_INSTALL) --no-deps -c $(VENV)/lock-pins.txt -r requirements/peers.txt; \
	$(COMPILE)
	@touch $@

# What only benchmarks compare with; all that these need is in the lock, with the peers, or listed.
$(BENCH): requirements/bench.txt $(PEERS)
	@echo 'installing ONNX Runtime and OpenVINO: a minute, about 300 MB'; set -e; \
	$(PIP_INSTALL) --no-deps -c $(VENV)/lock-pins.txt -r requirements/bench.txt
	@touch $@

# jax names the one libtpu that fits it; Linux on x86-64 only.
$(LIBTPU): $(CORE)
	@echo 'installing libtpu: a minute, about 700 MB'; set -e; \
	$(PIP_INSTALL) --no-deps "$$($(BIN)/python -c 'import importlib.metadata as m; \
	    print(next(r.split(";")[0] for r in m.requires("jax") if r.startswith("libtpu")))')"
	@touch $@

venv-tensorflow: $(TENSORFLOW)

# Not in $(VENV): nothing that trains may lean on TensorFlow. One lock serves every Python.
$(TENSORFLOW): requirements/build.txt requirements/tensorflow.txt | $(BIN)/python
	@echo 'installing TensorFlow and TFDS into $(TF): 1 to 2 minutes, about 2.5 GB'; set -e; \
	$(BIN)/python -m venv --clear $(TF); \
	install="$(TF)/bin/python -m pip install --disable-pip-version-check --quiet --require-hashes"; \
	$$install -r requirements/build.txt; \
	$$install --no-build-isolation --use-pep517 -r requirements/tensorflow.txt
	@touch $@

# Run again, it finds the training finished, and only evaluates and predicts.
demo: $(CORE)
	$(BIN)/python -m mbv2_jax.main --config=configs/digits.py --workdir=$(DEMO)
	@echo '$(BIN)/python -m mbv2_jax.main --config=configs/digits.py --mode=eval --checkpoint=$(DEMO)'
	@$(BIN)/python -m mbv2_jax.main --config=configs/digits.py --mode=eval --checkpoint=$(DEMO) \
	    > $(DEMO)/eval.txt || { cat $(DEMO)/eval.txt; exit 1; }
	@cat $(DEMO)/eval.txt
	@$(BIN)/python -c 'import json, sys; top1 = json.loads(open(sys.argv[1]).readlines()[-1])["top1"]; \
	    sys.exit(0 if top1 >= 97 else f"demo failed: top-1 is {top1:.2f} %, expected 97 % or more")' \
	    $(DEMO)/eval.txt
	$(BIN)/python -m mbv2_jax.data.digits --export=$(DEMO)/images
	$(BIN)/python -m mbv2_jax.predict $(DEMO)/images/*.png --checkpoint=$(DEMO)
	@echo 'The curves of loss, accuracy and learning rate: $(DEMO)/curves.png'

test: lint $(PEERS)
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile

test-slow: $(PEERS)
	$(BIN)/python -m pytest -m slow

test-tensorflow: $(PEERS) $(TENSORFLOW)
	$(BIN)/python -m pytest -m tensorflow

test-tpu: $(LIBTPU)
	$(BIN)/python -m pytest -m tpu tests/training/test_compile.py

# Quiet machines measure best. Each writes a CSV in benchmarks/.
bench-cpu: $(BENCH)
	$(BIN)/python -m benchmarks.cpu

bench-gpu: $(PEERS)
	$(BIN)/python -m benchmarks.gpu

bench-startup: $(PEERS)
	$(BIN)/python -m benchmarks.startup

# Writes benchmarks/input_pipeline.csv.
bench-input: $(PEERS) $(TENSORFLOW)
	@test -n "$(PHOTOS)" || { echo 'error: make bench-input PHOTOS=DIR, a folder of photos' >&2; exit 1; }
	$(BIN)/python -m benchmarks.input_pipeline --photos="$(PHOTOS)" \
	    --tensorflow-python=$(TF)/bin/python

lint: $(CORE)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(CORE)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# uv reads and writes the same file: without UPGRADE every version that still fits stays.
lock: .venv-lock/bin/uv
	@set -e; compile() { \
	    .venv-lock/bin/uv pip compile --quiet --no-config --generate-hashes $(UPGRADE) \
	        --custom-compile-command 'make lock' "$$@"; \
	}; \
	for lock in build tensorflow; do \
	    compile --universal --python-version 3.11 -o "requirements/$$lock.txt" \
	        "requirements/$$lock.in"; \
	done; \
	for lock in $(LOCKS:requirements/py3%.txt=%); do \
	    echo "requirements/py3$$lock.txt"; \
	    compile --python-version "3.$$lock" --extra demo --extra fast --extra test \
	        -o "requirements/py3$$lock.txt" setup.cfg; \
	done

.venv-lock/bin/uv: | $(BIN)/python
	$(BIN)/python -m venv --clear .venv-lock
	.venv-lock/bin/python -m pip install --disable-pip-version-check --quiet $(UV)

clean:
	rm -rf $(VENV) $(TF) .venv-lock build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
