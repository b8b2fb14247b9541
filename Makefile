# Everything is one command: each target first sets up what it needs (scripts/setup.sh), quickly when
# nothing has changed. Set-up speaks on standard error only: `make demo ARGS=--json | jq` works.
SHELL := /bin/bash
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help setup setup-test demo test kernels soak lint format bench bare bare-demo bare-sudo clean

# On a machine that must have everything the tests need, a test that is skipped has failed.
STRICT := $(shell [ "$$(id -u)" = 0 ] && [ -w /dev/userfaultfd ] && uname -r | \
	awk -F. '{ exit !($$1 > 6 || $$1 == 6 && $$2 >= 8) }' && echo 1 || echo 0)

# Arguments for the program that a target runs
ARGS ?=

help: ## what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s  %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## packages, .venv and the guest, without running anything
	@scripts/setup.sh

demo: setup ## boot twenty sandboxes from one template, and compare (ARGS=--json, ARGS=--help)
	@.venv/bin/pagekit demo $(ARGS)

test: lint ## set up everything; lints, Rust tests, Python tests (ARGS="-k share": arguments of pytest)
	PAGEKIT_STRICT=$(STRICT) cargo test --quiet --locked --workspace
	PAGEKIT_STRICT=$(STRICT) .venv/bin/pytest $(ARGS)

kernels: setup-test ## the Rust tests in guests with Debian's oldest and newest kernel, minutes each (ARGS="--kernel 6.12", --list)
	@.venv/bin/python tests/kernels.py $(ARGS)

soak: setup-test ## Firecracker's clients under load for a minute, every byte checked (ARGS="--seconds 600")
	@.venv/bin/python tests/soak.py $(ARGS)

lint: setup-test ## only the lints
	@scripts/lint.sh

format: setup-test ## rustfmt, and ruff format
	cargo fmt --all
	.venv/bin/ruff check --fix --quiet .
	.venv/bin/ruff format .

bench: setup ## every benchmark, in short (ARGS=--json)
	@set -e; for script in benchmarks/*.py; do .venv/bin/python "$$script" --quick $(ARGS); done

bare: ## prove `make demo`, again, and `make test` on a Debian 12 made from nothing (root, debootstrap)
	@scripts/bare.sh refused demo again test

bare-demo: ## only `make demo`, and again
	@scripts/bare.sh demo again

bare-sudo: ## prove set-up by a user with sudo, and the refusal without
	@scripts/bare.sh refused sudo

clean: ## remove all that was made or downloaded: .venv, target, build, .cache
	rm -rf .venv .cache target build python/*.egg-info .pytest_cache .mypy_cache .ruff_cache
	find python tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

setup-test:
	@scripts/setup.sh test
