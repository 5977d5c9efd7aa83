PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# timm's own tests come with its source release, not with its wheel.
TIMM_SOURCE := $(VENV)/timm-source

.PHONY: demo test test-all test-gpu bench docs lint

demo: $(VENV)/installed
	$(BIN)/python -m gunn_timm predict assets/cat.jpg

# One thread a process: as many processes as cores run at a time.
test test-all: export OMP_NUM_THREADS := 1

test: lint $(TIMM_SOURCE)
	$(BIN)/python -m pytest -q -n auto tests
	$(BIN)/python tests/run_timm_tests.py $(TIMM_SOURCE) -k '(gunn15 or gunn18) and not nores and not wide'

# And what is marked as slow, and timm's tests of the other models.
test-all: test
	$(BIN)/python -m pytest -q -n auto -m slow tests
	$(BIN)/python tests/run_timm_tests.py $(TIMM_SOURCE) -k 'sunn or gunn24 or nores or wide_gunn'

test-gpu: $(VENV)/installed-test
	$(BIN)/python -m pytest -q tests/test_gpu.py

# glibc hands freed memory back to the system at once, and faults it in again a step later.
bench: export MALLOC_MMAP_THRESHOLD_ := 4294967296
bench: export MALLOC_TRIM_THRESHOLD_ := 4294967296

bench: $(VENV)/installed-bench
	$(BIN)/python benchmarks/run.py

docs: $(VENV)/installed-bench
	$(BIN)/python docs/draw.py
	$(BIN)/python docs/results.py

lint: $(VENV)/installed-test
	$(BIN)/ruff check .

$(VENV)/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

$(VENV)/installed-bench: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[bench]'
	touch $@

$(TIMM_SOURCE): $(VENV)/installed-test
	rm -rf $@.part
	$(BIN)/pip download --quiet --disable-pip-version-check --no-binary :all: --no-deps --dest $@.part \
		timm==$$($(BIN)/python -c 'import timm; print(timm.__version__)')
	tar -xzf $@.part/timm-*.tar.gz --strip-components 1 -C $@.part
	rm -rf $@ && mv $@.part $@
