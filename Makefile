# make demo: erase concepts in the embedded world.    make test: the test suite.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.stamp

.PHONY: demo test check emoji-world bench-training bench-gate clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	$(BIN)/itd demo

test: $(STAMP)
	$(BIN)/python -m pytest

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir site

# Fetches the sources of the embedded world and trains its networks anew: hours on a laptop.
emoji-world: $(STAMP)
	$(BIN)/python -m recipes.emoji_world

# Measures training steps of ours, of a naive twin and of other libraries, which get environments of their own: hours.
bench-training: $(STAMP)
	$(PIP) install --progress-bar off -c $(VENV)/constraints.txt -e '.[benchmarks]'
	$(BIN)/python -m benchmarks.training --out runs/bench/training

# Checks captions at the paper's size and in the embedded world; makes a 3 GB autoencoder first.
bench-gate: $(STAMP)
	$(BIN)/python -m benchmarks.gate

# The pinned torch goes in first and alone, so that a local CPU wheel of that version is taken where there is one.
# Where the pin cannot be had, the range of pyproject.toml decides.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --progress-bar off --upgrade pip
	if $(PIP) install --progress-bar off -c constraints.txt torch; \
	then cp constraints.txt $(VENV)/constraints.txt; \
	else grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt; fi
	$(PIP) install --progress-bar off -c $(VENV)/constraints.txt -e '.[dev,emoji,evaluation]'
	touch $(STAMP)

# Leaves the environment and runs/ where they are.
clean:
	rm -rf site dist build htmlcov .coverage .pytest_cache .ruff_cache .hypothesis
	find src tests recipes benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
