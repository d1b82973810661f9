# make demo   a model for two boards in a few minutes, offline after the install
# make test   the whole test suite
# make lint   ruff, ruff format, mypy --strict
# make clean  everything that make made, but .venv
PYTHON ?= python3
VENV := .venv/bin
# What the wheel maps to xedge.targets and so on; mypy does not follow that mapping through an editable install.
FACTS := targets calibration benchmarks

.PHONY: demo test lint clean
.DELETE_ON_ERROR:

demo: .venv/.installed
	$(VENV)/xedge compress --target jetson --target android -o demo-run

test: .venv/.installed
	$(VENV)/python -m pytest -n 2 --dist loadfile

lint: .venv/.installed
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	@rm -rf build/typed && mkdir -p build/typed
	@cp -r xedge build/typed/xedge && cp -r $(FACTS) build/typed/xedge/
	@set -o pipefail; $(VENV)/mypy --strict build/typed/xedge \
	  | sed -E 's#build/typed/xedge/(targets|calibration|benchmarks)/#\1/#; s#build/typed/##'

.venv/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else \
	  "xedge needs Python 3.11 to 3.13, this is %d.%d: run make PYTHON=python3.13" % v)'
	@$(VENV)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	$(VENV)/python -m pip install -e '.[dev,tensorrt-lint,ssh,browser]'
	@touch $@

clean:
	rm -rf build dist demo-run xedge.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

lint: SHELL := bash
