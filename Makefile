.DEFAULT_GOAL := help
.PHONY: help setup demo test test-clusters test-faults lint

# The first Python that set-up takes; with none of them, python3, so that set-up says which it wants.
PYTHON ?= $(or $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -ISc 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$python && break; done),python3)
VENV := .venv/bin

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## make .venv with everything pinned, and prepare the default model; again: a second
	@$(PYTHON) .setup/setup.py

demo: setup ## run the helpdesk example on this machine into runs/helpdesk
	@$(VENV)/bt-ray run bt_ray/tasks/helpdesk/config.yaml --run-dir runs/helpdesk

# REPORTS=FOLDER leaves there what each test ended as: benchmarks/faults.py counts from it.
report = $(if $(REPORTS),--junitxml=$(REPORTS)/$(1).xml)

# Two files at a time, each with clusters of its own: starting processes, which is most of what the real parts do, takes one core.
# In their order: by default the files of many tests come first, and the two longest of e2e, which are few, last.
TWO := --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Of the long runs these come first: one that began last would run alone.
LONGEST := $(addprefix tests/long/,test_tasks.py test_optimisers.py test_a_grown_run.py test_a_run_in_a_bucket.py test_more_than_there_is.py)

test: setup ## the tests; ARGS=tests/unit for the quick ones
ifdef ARGS
	@$(VENV)/python -m pytest $(ARGS)
else
	@$(VENV)/python -m pytest $(TWO) $(call report,unit) tests/unit
	@$(VENV)/python -m pytest $(TWO) $(call report,real) tests/e2e tests/ray tests/gpu
endif

test-clusters: setup ## clusters of several nodes: they come and go with the work, and are lost in the middle of it
	@$(VENV)/python -m pytest $(call report,clusters) tests/clusters

test-faults: setup ## faults injected into whole runs, and the long runs: every shipped task, every optimiser, several models
	@$(VENV)/python -m pytest $(call report,faults) tests/faults
	@$(VENV)/python -m pytest $(TWO) $(call report,long) $(LONGEST) $(filter-out $(LONGEST),$(wildcard tests/long/test_*.py))

lint: setup ## ruff and mypy
	@$(VENV)/ruff check .
	@$(VENV)/ruff format --check .
	@$(VENV)/mypy
