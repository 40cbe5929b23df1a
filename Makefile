# Everything runs in .venv, which is made when it is missing and renewed when pyproject.toml changes.
.DEFAULT_GOAL := help
.PHONY: help demo test test-slow bench lint readme clean

VENV := .venv
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready
CANDIDATES := python3 python3.14 python3.13 python3.12 python3.11
BENCHMARKS = $(basename $(notdir $(shell grep -l '^if __name__ == "__main__"' benchmarks/*.py)))

help:
	@echo "make demo       ask the bundled model about the bundled picture, with VAR; writes look-demo/report.html"
	@echo "make test       the tests, without the slow ones"
	@echo "make test-slow  the slow tests"
	@echo "make bench      the benchmarks (CPU, or a GPU where there is one)"
	@echo "make lint       ruff: style and format"
	@echo "make readme     renew the table of systems in README.md"
	@echo "make clean      remove .venv and caches"

$(READY): pyproject.toml
	@test -x $(PYTHON) || { \
	  for name in $(CANDIDATES); do \
	    if $$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$name; break; fi; \
	  done; \
	  test -n "$$found" || { echo "Python 3.11 or later is needed; none of: $(CANDIDATES)" >&2; exit 1; }; \
	  echo "making $(VENV) with $$found"; \
	  $$found -m venv $(VENV) || { rm -rf $(VENV); echo "the venv module is needed (Debian: apt install python3-venv)" >&2; exit 1; }; \
	}
	$(PYTHON) -m pip install --quiet --editable '.[dev]'
	@touch $(READY)

demo: $(READY)
	$(VENV)/bin/sightline look --out look-demo
	@echo "open $(CURDIR)/look-demo/report.html in a browser"

test: $(READY)
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --timeout 900 -m "not slow"

test-slow: $(READY)
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 -m slow

bench: $(READY)
	@set -e; for name in $(BENCHMARKS); do echo "== benchmarks.$$name"; $(PYTHON) -m benchmarks.$$name; done

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

readme: $(READY)
	$(PYTHON) -m sightline.catalog

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
