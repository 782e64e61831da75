# Everything runs in the project's own virtual environment, which the targets below create and fill.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The PyTorch build: the docs tell how to choose a CPU or a CUDA one.
TORCH ?= torch==2.13.0
# How to install: constraints pin every other version.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
WORKERS ?= 2
# A worker that dies is not replaced: with a replacement, pytest-xdist 3.8 may wait for ever (pytest-xdist#1378).
PYTEST_WORKERS := -n $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0
# More for the tests of a GPU: PYTEST='-k "not speed"'.
PYTEST ?=

.PHONY: demo models test test-slow test-gpu test-page test-ray test-triton chromium check format lint sizes types imports docs site clean

demo: $(VENV)/.ready  ## train, export, verify and sample on real images; writes demo/report.html
	$(BIN)/admtrt demo --out demo

MODELS := models/fashion-mnist
models: $(VENV)/.ready  ## train the models of Fashion-MNIST, or go on with it; writes models/fashion-mnist
	$(BIN)/admtrt train classifier configs/fashion-mnist.toml --out runs/fashion --resume
	$(BIN)/admtrt train unet configs/fashion-mnist.toml --out runs/fashion --resume
	$(BIN)/admtrt train unet configs/fashion-mnist-unconditional.toml --out runs/fashion-unconditional --resume
	$(BIN)/admtrt convert runs/fashion/classifier.safetensors $(MODELS)/classifier.safetensors --dtype fp16 --overwrite
	$(BIN)/admtrt convert runs/fashion/unet.safetensors $(MODELS)/unet.safetensors --dtype fp16 --overwrite
	$(BIN)/admtrt convert runs/fashion-unconditional/unet.safetensors $(MODELS)/unconditional.safetensors \
		--dtype fp16 --overwrite

test: $(VENV)/.ready-dev chromium  ## the default tests
	$(BIN)/python -m pytest $(PYTEST_WORKERS)

test-slow: $(VENV)/.ready-dev  ## the tests that take minutes
	$(BIN)/python -m pytest $(PYTEST_WORKERS) -m slow

test-page: $(VENV)/.ready-dev chromium  ## the server's page, in a real browser
	ADMTRT_REQUIRE_CHROMIUM=1 $(BIN)/python -m pytest tests/unit/serve/test_serve_page.py -rs

# Ray in an environment of its own that sees the project's: what it brings must not be there in other tests.
$(VENV)-ray/.ready: $(VENV)/.ready-dev constraints.txt pyproject.toml
	$(PYTHON) -m venv --clear $(VENV)-ray
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
		> "$$($(VENV)-ray/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth"
	$(VENV)-ray/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt "ray[serve]>=2.60"
	touch $@

test-ray: $(VENV)-ray/.ready  ## sampling, evaluation and the server on a cluster; installs Ray
	$(VENV)-ray/bin/python -m pytest tests/on_cluster -m ray -rs -W ignore

# Only the binaries of the first are used, which ask for an older NumPy.
$(VENV)-triton/.ready: constraints.txt
	$(PYTHON) -m venv $(VENV)-triton
	$(VENV)-triton/bin/python -m pip install --quiet --disable-pip-version-check --no-deps nvidia-pytriton==0.7.0
	$(VENV)-triton/bin/python -m pip install --quiet --disable-pip-version-check "tritonclient[grpc]==2.73.0"
	touch $@

test-triton: $(VENV)/.ready-dev $(VENV)-triton/.ready  ## a real tritonserver, without a GPU
	ADMTRT_TRITON=$(abspath $(VENV)-triton) $(BIN)/python -m pytest tests/tritonserver -m triton -rs

# A browser for the tests of the page, where there is none and Debian's can be installed.
chromium:
	@command -v chromium chromium-browser google-chrome >/dev/null 2>&1 || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
		&& apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; } \
		|| echo "no browser: the tests of the page are skipped"

test-gpu: $(VENV)/.ready-dev  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu -rs $(PYTEST)

check: lint sizes types imports  ## everything but the tests

format: $(VENV)/.ready-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(VENV)/.ready-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

sizes: $(VENV)/.ready-dev
	$(BIN)/python tools/check_sizes.py

types: $(VENV)/.ready-dev $(VENV)/stubs
	$(BIN)/mypy

imports: $(VENV)/.ready-dev
	$(BIN)/lint-imports

docs: $(VENV)/.ready-dev  ## regenerate docs/cli.md and docs/configuration.md
	$(BIN)/python -m typer admtrt.cli utils docs --name admtrt --output docs/cli.md
	$(BIN)/python tools/configuration_page.py docs/configuration.md

# What Sphinx warns of, a reference or link that leads nowhere included, ends the build; so does a resource from outside.
site: $(VENV)/.ready-site  ## the pages and the Python reference as a site; writes build/site
	rm -rf build/site
	$(BIN)/sphinx-build -W --keep-going -n -q -c docs/site . build/site
	$(BIN)/python tools/check_site.py build/site
	@echo "build/site/README.html"

# For mypy alone: installed beside the packages, these stubs would look like TensorRT itself. They were made by a
# tool, and some lines of them are no Python, no types, or hide one.
$(VENV)/stubs: $(BIN)/python constraints.txt
	$(PIP_INSTALL) --no-deps --upgrade --target $@ tensorrt-stubs
	sed -i -e 's/, in: /, in_: /' -e 's/= None, channel_axis: int)/= None, channel_axis: int = ...)/' \
		-e 's/-> \.\.\.:/-> typing.Any:/' -e '/^bool: /d' $@/tensorrt_bindings/tensorrt.pyi
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-triton $(VENV)-ray build dist demo

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# PyTorch first and by itself, so that nothing else picks another build of it.
$(VENV)/.torch: $(BIN)/python constraints.txt
	$(PIP_INSTALL) "$(TORCH)"
	touch $@

$(VENV)/.ready: $(VENV)/.torch pyproject.toml
	$(PIP_INSTALL) --editable ".[all]"
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(PIP_INSTALL) --editable ".[dev]"
	touch $@

$(VENV)/.ready-site: $(VENV)/.ready
	$(PIP_INSTALL) --editable ".[all,site]"
	touch $@
