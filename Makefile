# make demo | test | lint. Each makes the virtual environment it needs, and installs anew when pyproject.toml changes.
# make oracle writes the fixtures of the tests anew, with Transformers and torch in an environment of their own.
#
#   make demo EXTRAS=cuda12         an NVIDIA GPU (or cuda13)
#   make test ARGS="-k cache -x"    arguments for pytest, which runs in two processes (for demo: for `eejax demo`)
#   make test PYTHON=python3.13     another interpreter, when .venv is first made
#   make test VENV=.venv-313        another virtual environment
#   make oracle ORACLE_PYTHON=/path/to/python3.11

VENV ?= .venv
PYTHON ?= python3
EXTRAS ?=
ARGS ?=
ORACLE_PYTHON ?= python3.11
ORACLE_VENV ?= .venv-oracle

bin := $(VENV)/bin
comma := ,
space := $() $()
extras := $(subst $(space),$(comma),$(strip $(EXTRAS)))
suffix := $(if $(extras),-$(subst $(comma),-,$(extras)))
demo_ready := $(VENV)/.installed-demo$(suffix)
test_ready := $(VENV)/.installed-test$(suffix)
lint_ready := $(VENV)/.installed-dev$(suffix)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test lint format oracle

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

demo: $(demo_ready)
	@$(bin)/eejax demo $(ARGS)

test: $(test_ready)
	@$(bin)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(lint_ready)
	@failed=0; \
	for check in "ruff check ." "ruff format --check ." "pyright --pythonpath $(bin)/python" "lint-imports"; do \
		echo "== $$check"; $(bin)/$$check || failed=1; \
	done; exit $$failed

format: $(lint_ready)
	$(bin)/ruff check --fix .
	$(bin)/ruff format .

# The first interpreter of these that is new enough, or nothing.
find_python = for candidate in "$(PYTHON)" python3 python3.13 python3.12; do \
	if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; \
	then echo "$$candidate"; break; fi; done

# uv fetches a Python 3.12 where there is none; only a virtual environment is ever removed, never another folder.
$(bin)/python:
	@if [ -e "$(VENV)/pyvenv.cfg" ]; then rm -rf "$(VENV)"; fi; \
	python=$$($(find_python)); \
	if command -v uv >/dev/null 2>&1; then \
		echo "Making $(VENV) with uv and Python $${python:-3.12}"; \
		uv venv --quiet --python "$${python:-3.12}" "$(VENV)"; \
	elif [ -n "$$python" ]; then \
		echo "Making $(VENV) with $$python"; \
		"$$python" -m venv "$(VENV)"; \
	else \
		found=$$("$(PYTHON)" --version 2>/dev/null) || found="missing"; \
		echo "eejax needs Python 3.12 or newer, and $(PYTHON) is $$found." >&2; \
		echo "Install one and name it (make PYTHON=/path/to/python3.12 ...), or install uv, which fetches it." >&2; \
		exit 1; \
	fi

# $(call install,extra): the project, editable, with this extra and those of EXTRAS.
define install
	@what='.$(if $(1)$(extras),[$(subst $(space),$(comma),$(strip $(1) $(extras)))])'; \
	echo "Installing $$what into $(VENV) (the first time takes a minute or two)"; \
	if command -v uv >/dev/null 2>&1; then \
		uv pip install --quiet --python "$(bin)/python" --editable "$$what"; \
	else \
		"$(bin)/python" -m pip --version >/dev/null 2>&1 || "$(bin)/python" -m ensurepip >/dev/null || exit 1; \
		"$(bin)/python" -m pip install --quiet --quiet --disable-pip-version-check --editable "$$what"; \
	fi
	@touch "$@"
endef

$(demo_ready): pyproject.toml | $(bin)/python
	$(call install,)

$(test_ready): pyproject.toml | $(bin)/python
	$(call install,test)

# dev holds what test and demo need
$(lint_ready): pyproject.toml | $(bin)/python
	$(call install,dev)
	@touch "$(test_ready)" "$(demo_ready)"

# Transformers and torch: nothing that is shipped needs them, and no test that `make test` does not skip without them.
oracle_bin := $(ORACLE_VENV)/bin
oracle_needs := tests/oracle/requirements.txt
oracle_ready := $(ORACLE_VENV)/.installed

oracle: $(oracle_ready)
	$(oracle_bin)/python tests/oracle/make_models.py --out tests/fixtures/models
	$(oracle_bin)/python tests/oracle/make_tokenizers.py --out tests/fixtures/tokenizers

# The first Python 3.11 of these that can make environments. pyenv's own are named too, because the .python-version of this
# folder hides them.
find_oracle_python = for candidate in "$(ORACLE_PYTHON)" python3.11 \
	"$$(PYENV_VERSION=3.11 pyenv which python3.11 2>/dev/null)" "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.11*/bin/python; do \
	if "$$candidate" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info[:2] != (3, 11))' >/dev/null 2>&1; \
	then echo "$$candidate"; break; fi; done

$(oracle_ready): $(oracle_needs)
	@if [ -e "$(ORACLE_VENV)/pyvenv.cfg" ]; then rm -rf "$(ORACLE_VENV)"; fi; \
	python=$$($(find_oracle_python)); \
	echo "Installing Transformers and torch into $(ORACLE_VENV) (some minutes)"; \
	if command -v uv >/dev/null 2>&1; then \
		uv venv --quiet --python "$${python:-3.11}" "$(ORACLE_VENV)" && \
		uv pip install --quiet --python "$(oracle_bin)/python" -r $(oracle_needs); \
	elif [ -n "$$python" ]; then \
		"$$python" -m venv "$(ORACLE_VENV)" && \
		"$(oracle_bin)/python" -m pip install --quiet --quiet --disable-pip-version-check -r $(oracle_needs); \
	else \
		echo "The oracle needs Python 3.11 with the modules venv and ensurepip, and there is none." >&2; \
		echo "Install one and name it (make oracle ORACLE_PYTHON=/path/to/python3.11), or install uv, which fetches it." >&2; \
		exit 1; \
	fi
	@touch "$@"
