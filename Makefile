# make demo    train, score and account for the embedded default; no GPU, no hub, no questions
# make test    every test, style and types; what CI runs
# make quick   the fast tests only
# make matrix  every case of the long sweeps, of which make test runs a daily sample
# make stacks  the fast tests and one recipe on the oldest and on the newest versions that pyproject.toml admits, each in an
#              environment of its own; UV_TORCH_BACKEND=cpu make stacks takes PyTorch's small CPU build
# make gpu     measures on this machine's GPU for MINUTES (9) whatever is claimed about GPUs; with PYTHON=python3, without .venv
# make bench   repeats the benchmarks of levers: how far each card reaches (an hour), and their cost (minutes, on an idle machine);
#              with THROUGHPUT="--data D --llama L --t5_tokenizer T --peers P" also tokens a second beside other trainers
# make setup   only the environment, in .venv
# make extensions   what DeepSpeed compiles for offloading, now rather than in the first run that needs it (minutes)
.PHONY: setup extensions demo test quick matrix stacks check results bench gpu
PYTHON ?= python3
# Also for what a package needs to be built: DeepSpeed is built on the spot, against the same torch.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(CURDIR)/constraints.txt
BIN := .venv/bin

setup: .venv/.footprint
extensions: setup
	$(BIN)/python -m toolkit.distributed.deepspeed
demo: setup
	$(BIN)/accelerate launch --config_file launch/single.yaml recipes/lora.py

test: .venv/.footprint-test check
	$(BIN)/python -m pytest -q -n 2 --dist worksteal
quick: .venv/.footprint-test
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow"
matrix: .venv/.footprint-test
	$(BIN)/python -m pytest -q -m "matrix or long" --matrix
stacks: .venv/.footprint-test
	$(BIN)/python -m pip install --quiet --editable ".[stacks]"
	$(BIN)/python benchmarks/stacks.py
check: .venv/.footprint-test
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
# Where PYTHON is given it runs as it is, for a machine whose python3 has torch; else that of .venv does.
ifeq ($(origin PYTHON),command line)
gpu:
	$(PYTHON) benchmarks/gpu.py --minutes $(or $(MINUTES),9) $(if $(OUT),--out $(OUT))
else
gpu: setup
	$(BIN)/python benchmarks/gpu.py --minutes $(or $(MINUTES),9) $(if $(OUT),--out $(OUT))
endif
bench: setup
	$(BIN)/python benchmarks/ladder.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/costs.py
	$(BIN)/python benchmarks/streamed.py
	$(BIN)/python benchmarks/reach.py
	$(if $(THROUGHPUT),$(BIN)/python benchmarks/throughput.py $(THROUGHPUT))
	$(BIN)/python benchmarks/readme.py
results: setup
	$(BIN)/python benchmarks/embedded.py
	$(BIN)/python benchmarks/error_distribution.py
	$(BIN)/python benchmarks/readme.py

# Each stamp is as new as the environment: nothing is installed while the constraints and the metadata are unchanged.
.venv/.footprint: constraints.txt pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
	  { echo "error: $$($(PYTHON) --version) is too old; footprint needs Python 3.11 or newer: make PYTHON=python3.12"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@
.venv/.footprint-test: .venv/.footprint
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	@touch $@
