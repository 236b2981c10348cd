# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
# PYTHON= and TORCH= choose another interpreter or another torch requirement.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: demo test sanitize lint format bench clean

demo: .venv/.installed
	$(BIN)/python examples/demo.py

test: .venv/.installed
	$(BIN)/python -m pytest

# The op tests on CPU kernels with AddressSanitizer and UBSan; the build takes some minutes.
sanitize: .venv/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/sanitize.py

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files 'csrc/*' 'tests/*.cpp' 'tests/*.cu*' 'tests/*.h' | xargs $(BIN)/clang-format --dry-run -Werror

format: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files 'csrc/*' 'tests/*.cpp' 'tests/*.cu*' 'tests/*.h' | xargs $(BIN)/clang-format -i

bench: .venv/.installed
	$(BIN)/python -m pytest benchmarks

clean:
	rm -rf .venv build dist out *.egg-info fastseg/_C*.so

# Torch comes first and alone: fastseg is compiled against the torch that is already there.
.venv/.torch:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fastseg needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check '$(TORCH)' numpy
	touch $@

# Rebuilt (incrementally, by ninja) whenever a source of the extension changes.
.venv/.installed: .venv/.torch setup.py pyproject.toml $(shell find csrc -type f)
	$(BIN)/pip install --quiet --disable-pip-version-check 'setuptools>=77.0.3,<82' pybind11 ninja
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation -e '.[dev]'
	touch $@
