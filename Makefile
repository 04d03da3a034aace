# make demo    install into .venv and compare MAN++ with end-to-end training on the digits
# make test    install into .venv, then lint, types and every test
# make bench   install into .venv and run the benchmarks (NAME=ema_scale_update for one of them)
# make compat  run the tests of the library that `make test` built under the oldest PyTorch: COMPAT="torch==2.11.0 …"
# make clean   remove everything that the above made, except runs/
#
# VENV is the virtual environment, PYTHON the interpreter it is made from (3.10 or later).

VENV ?= .venv
PYTHON ?= python3
NAME ?=
COMPAT ?= torch==2.10.0 torchvision==0.25.0

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

# What the tests need beside the package, which is not installed but found in this checkout, native modules and all.
define TEST_REQUIRES
try: import tomllib
except ImportError: from pip._vendor import tomli as tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
wanted = [*project["dependencies"], *extras["train"], *extras["test"]]
print("\n".join(r for r in wanted if not r.startswith(project["name"])))
endef
export TEST_REQUIRES

# A worker on each core, each with one thread: threads that wait for one another on busy cores take longer than one alone.
# How the kernels divide their work among threads is tested with threads all the same.
TESTS := -m pytest -n logical --maxprocesses 8 --dist worksteal

.PHONY: demo test bench compat clean

# What `make test` installed will do. The demo alone, where there is no GPU, does without the minutes that CUDA kernels take
# to compile.
demo: $(or $(wildcard $(VENV)/.with-test),$(VENV)/.with-train)
	$(BIN)/manpp demo

$(VENV)/.with-train: export MANPP_CUDA ?= $(if $(shell command -v nvidia-smi),auto,off)

test: $(VENV)/.with-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python $(TESTS)

bench: $(VENV)/.with-test
	$(BIN)/manpp bench $(NAME)

compat: $(VENV)/.with-test
	$(PYTHON) -m venv $(VENV)-compat
	$(VENV)-compat/bin/python -c "$$TEST_REQUIRES" > $(VENV)-compat/requirements.txt
	$(VENV)-compat/bin/python -c "$$BUILD_REQUIRES" >> $(VENV)-compat/requirements.txt
	$(VENV)-compat/bin/python -m pip install --disable-pip-version-check $(COMPAT) -r $(VENV)-compat/requirements.txt
	PATH="$(abspath $(VENV)-compat/bin):$$PATH" PYTHONPATH="$(CURDIR)" OMP_NUM_THREADS=1 $(VENV)-compat/bin/python $(TESTS)

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
	rm -rf $(VENV) $(VENV)-compat build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f manpp_kernels/*.so
	find manpp_kernels python_tests bench -type d -name __pycache__ -prune -exec rm -rf {} +
