#!/bin/bash
# All lints, of Rust and of Python. `make setup-test` has made what they need.
#
# Warnings of clippy are errors with the version that is meant, so that a newer one, with lints that
# nobody has seen yet, does not break anybody's `make test`. No toolchain file says this: one would
# make rustup download that version for everybody who only wants to build.
set -euo pipefail
cd "$(dirname "$0")/.."
meant=1.95.0

export RUSTUP_AUTO_INSTALL=0
cargo=(cargo)
if rustup toolchain list 2>/dev/null | grep -q "^$meant-"; then
    cargo=(cargo "+$meant")
fi
found=$("${cargo[@]}" --version | cut -d' ' -f2)
deny=(-D warnings)
if [ "$found" != "$meant" ]; then
    echo "lint: with Rust $found; $meant is meant, so warnings of clippy are only shown"
    deny=()
fi

if "${cargo[@]}" fmt --version >/dev/null 2>&1; then
    "${cargo[@]}" fmt --all --check
else
    echo "lint: skipped rustfmt, which is not beside this Rust (rustup component add rustfmt, or the package rustfmt-web)"
fi
if "${cargo[@]}" clippy --version >/dev/null 2>&1; then
    "${cargo[@]}" clippy --quiet --locked --workspace --all-targets -- "${deny[@]}"
else
    echo "lint: skipped clippy, which is not beside this Rust (rustup component add clippy, or the package rust-web-clippy)"
fi

.venv/bin/ruff check --quiet .
.venv/bin/ruff format --quiet --check .
.venv/bin/mypy
