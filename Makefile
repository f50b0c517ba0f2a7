.DEFAULT_GOAL := help
.PHONY: help setup demo test lint

PYTHON ?= python3
VENV := .venv/bin

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## make .venv with everything pinned, and prepare the default model; again: a second
	@$(PYTHON) .setup/setup.py

demo: setup ## run the helpdesk example on this machine into runs/helpdesk
	@$(VENV)/bt-ray run bt_ray/tasks/helpdesk/config.yaml --run-dir runs/helpdesk

test: setup ## the tests; ARGS=tests/unit for the quick ones
	@$(VENV)/python -m pytest $(or $(ARGS),tests)

lint: setup ## ruff and mypy
	@$(VENV)/ruff check .
	@$(VENV)/ruff format --check .
	@$(VENV)/mypy
