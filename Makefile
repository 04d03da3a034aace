# make demo    install into .venv and compare MAN++ with end-to-end training on the digits
# make test    install into .venv, then lint, types and every test
# make bench   install into .venv and run the benchmarks (NAME=ema_scale_update for one of them)
# make clean   remove everything that the above made, except runs/
#
# VENV is the virtual environment, PYTHON the interpreter it is made from (3.10 or later).

VENV ?= .venv
PYTHON ?= python3
NAME ?=

BIN := $(VENV)/bin
# The build looks for cmake and ninja on the PATH.
PIP := PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
SOURCES := pyproject.toml constraints.txt $(wildcard setup.py CMakeLists.txt) \
           $(shell find csrc cmake -type f 2>/dev/null)

# What has to be there to build without isolation has one home, pyproject.toml. Python 3.10 has no tomllib; pip brings one.
define BUILD_REQUIRES
try: import tomllib
except ImportError: from pip._vendor import tomli as tomllib
print("\n".join(tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"]))
endef
export BUILD_REQUIRES

.PHONY: demo test bench clean

demo: $(VENV)/.with-train
	$(BIN)/manpp demo

test: $(VENV)/.with-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

bench: $(VENV)/.with-test
	$(BIN)/manpp bench $(NAME)

$(VENV)/.requirements: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "$$BUILD_REQUIRES" > $(VENV)/requirements.txt
	$(PIP) -r $(VENV)/requirements.txt
	touch $@

# Built without isolation, against the PyTorch that it will run with.
$(VENV)/.with-%: $(VENV)/.requirements $(SOURCES)
	$(PIP) --no-build-isolation -e ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f manpp_kernels/*.so
	find manpp_kernels python_tests bench -type d -name __pycache__ -prune -exec rm -rf {} +
