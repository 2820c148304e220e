# The two commands of the README, and what developers run. Each makes what it needs in .venv.
PYTHON ?= python3
BIN := .venv/bin
DEMO := demo

.PHONY: demo test test-slow lint audit bundles lock dist docs notebook clean

$(BIN)/regpipe: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[test]"
	@touch $@

# Register two real pairs; train the three bundles on synthetic ultrasound, compare them, register new pairs with the best.
demo: $(BIN)/regpipe
	$(BIN)/regpipe register docs/examples/real/lung_ct -o $(DEMO)/lung
	$(BIN)/regpipe register docs/examples/real/brain_ultrasound -o $(DEMO)/ultrasound
	$(BIN)/regpipe phantom $(DEMO)/training --pairs 150
	$(BIN)/regpipe phantom $(DEMO)/new --pairs 6 --seed 1
	$(BIN)/regpipe compare $(DEMO)/training -o $(DEMO)/comparison --set max_epochs=16 --set pairs_per_epoch=40
	$(BIN)/regpipe register $(DEMO)/new --bundle $(DEMO)/comparison -o $(DEMO)/registered
	@echo
	@cat $(DEMO)/comparison/comparison.md
	@echo
	@echo "transforms  $(DEMO)/registered/case_000/moving_to_fixed.h5, fixed_to_moving.h5 (ITK, Slicer), 1Warp.nii.gz ... (ANTs)"
	@echo "pictures    $(DEMO)/lung/followup_to_baseline/sheet.png, $(DEMO)/registered/case_000/sheet.png"
	@echo "metrics     $(DEMO)/registered/metrics.csv"
	@echo "dashboard   $(BIN)/regpipe dashboard $(DEMO)/comparison"

# Files of tests side by side, each process on one thread.
test: $(BIN)/regpipe
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n auto --maxprocesses 4 --dist loadfile

test-slow: $(BIN)/regpipe
	$(BIN)/python -m pytest -m slow

lint: $(BIN)/regpipe
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/bandit --quiet -c pyproject.toml -r regpipe

# What is installed, against the known vulnerabilities (needs a network), and as a bill of materials: build/sbom.json.
audit: $(BIN)/cyclonedx-py
	mkdir -p build
	$(BIN)/cyclonedx-py environment $(BIN)/python --output-format JSON --output-file build/sbom.json
	$(BIN)/pip-audit --requirement $(LOCK) --require-hashes --disable-pip

$(BIN)/cyclonedx-py: | $(BIN)/regpipe
	$(BIN)/python -m pip install --quiet -e ".[audit]"
	@touch $@

# The three bundles are written from regpipe/bundle/template; edit there.
bundles: $(BIN)/regpipe
	$(BIN)/python -c "from regpipe.bundle.write import write_all; write_all('bundles')"

# What the container installs, by hash, and what builds regpipe in it; needs uv. Refresh it when dependencies change.
LOCK := docs/examples/requirements.lock
lock:
	echo "hatchling>=1.27" | uv pip compile pyproject.toml - --quiet --universal --generate-hashes --python-version 3.10 \
		--custom-compile-command "make lock" --output-file $(LOCK)

# Source distribution and wheel, as they are published, and what the package index asks of them.
DIST := dist
dist: $(BIN)/twine
	$(BIN)/python -m build --outdir $(DIST) . >/dev/null
	$(BIN)/twine check --strict $(DIST)/*

$(BIN)/twine: | $(BIN)/regpipe
	$(BIN)/python -m pip install --quiet -e ".[release]"
	@touch $@

# The documentation as a site in build/site; a page that is missing, and a link or heading that leads nowhere, is an error.
docs: $(BIN)/mkdocs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict -f docs/site/mkdocs.yml

$(BIN)/mkdocs: | $(BIN)/regpipe
	$(BIN)/python -m pip install --quiet -e ".[docs]"
	@touch $@

# Run docs/tutorial.ipynb from top to bottom; a cell that fails is an error. The file keeps no outputs.
notebook: $(BIN)/jupyter-execute
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/jupyter-execute --timeout=600 docs/tutorial.ipynb

$(BIN)/jupyter-execute: | $(BIN)/regpipe
	$(BIN)/python -m pip install --quiet -e ".[notebook]"
	@touch $@

clean:
	rm -rf $(DEMO) build .venv
