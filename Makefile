# What a person runs and what CI runs are the same targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Compiled when the package is installed; without a C++ compiler torch computes alone.
KERNELS := $(wildcard service/engine/cpu/*.cpp service/engine/cpu/*.h)

.PHONY: serve test check format demo-model demo-adapter bench chart image play monitoring

serve: $(VENV)/installed
	$(BIN)/snugfit serve $(MODEL)

test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m service.config_doc --check
	$(BIN)/python -m docs.picture --check
	$(BIN)/python -m deployment.chart_readme --check
	$(BIN)/python -m deployment.monitoring.dashboard --check

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Replaces service/demo when the evaluation passes; about 35 minutes on 2 cores.
demo-model: $(VENV)/installed-dev
	$(BIN)/python -m demo_model.train

# Replaces examples/pirate-adapter when the evaluation passes; about 7 minutes of CPU time.
demo-adapter: $(VENV)/installed-dev
	$(BIN)/python -m demo_model.adapter

bench: $(VENV)/installed-dev
	$(BIN)/python -m benchmarks.make_model 0.5b build/models/0.5b
	$(BIN)/python -m benchmarks.plan_vs_measured build/models/0.5b
	$(BIN)/python -m benchmarks.serve build/models/0.5b
	$(BIN)/python -m benchmarks.start build/models/0.5b

# Each of these skips aloud what it has no tool for; what it fetches lies in build/.
chart: $(VENV)/installed-dev
	$(BIN)/python -m deployment.chart

image: $(VENV)/installed-dev
	$(BIN)/python -m deployment.image

# The chart, rendered, in containers that `make image` has made.
play: $(VENV)/installed-dev
	$(BIN)/python -m deployment.play

# Rules and dashboard against a real Prometheus; about two minutes.
monitoring: $(VENV)/installed-dev
	$(BIN)/python -m deployment.monitoring

# torch is pinned first and alone, so that nothing else can pull another build of it.
$(VENV)/installed: pyproject.toml constraints.txt $(KERNELS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@
