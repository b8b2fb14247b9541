#!/bin/bash
# Sets up everything that `make demo` needs, or with the argument "test", `make test` too:
#
#   1. packages of the distribution, those that are missing, without recommended ones, removing none
#   2. .venv, with pagekit installed in it: extension, preload library and server program
#   3. .cache/guest, the kernel and initramfs that the demo boots
#
# Each step looks first whether it was done, so running this again is quick, and changing a source
# builds only what depends on it. Everything is said on standard error. PYTHON chooses an interpreter,
# PAGEKIT_CACHE another place than .cache.
set -euo pipefail
exec 1>&2
cd "$(dirname "$0")/.."
purpose=${1:-demo}

say() { echo "setup: $*"; }
die() { echo "error: $1"; [ -z "${2:-}" ] || echo "hint: $2"; exit 1; }
have() { command -v "$1" >/dev/null; }

# ---- 1. packages

# Prints an interpreter that can make the environment; fails if there is none.
find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 /usr/bin/python3 python3.14 python3.13 python3.12 python3.11}; do
        "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
        "$candidate" -c 'import sys; print(sys._base_executable)' # not that of an active .venv
        return
    done
    return 1
}

# Is there a Rust that can build this? Asked outside the checkout, where no toolchain file counts.
rust_is_new_enough() {
    local found wanted
    have cargo && found=$(cd / && rustc --version 2>/dev/null | cut -d' ' -f2) && [ -n "$found" ] || return 1
    wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
    printf '%s\n%s\n' "$wanted" "${found%%-*}" | sort -C -V
}

needed_packages() {
    find_python >/dev/null || echo python3 python3-venv
    have cc || echo gcc libc6-dev
    have qemu-system-x86_64 || echo qemu-system-x86
    [ -e /etc/ssl/certs/ca-certificates.crt ] || echo ca-certificates
    # Debian's own rustc is older than rust-version; the packages kept for browsers are not.
    rust_is_new_enough || echo rustc-web cargo-web
}

# Without these, lints and tests are skipped, and say so.
wanted_packages() {
    [ "$purpose" = test ] || return 0
    have strace || echo strace
    # The lints of the distribution's Rust; of another one they come the way it came.
    if ! rust_is_new_enough || [ "$(command -v cargo)" = /usr/bin/cargo ]; then
        have cargo-clippy || echo rust-web-clippy
        have cargo-fmt || echo rustfmt-web
    fi
}

# Asked for several, apt-cache succeeds if it knows one.
apt_knows() { [ "$(apt-cache show --no-all-versions "$@" 2>/dev/null | grep -c '^Package: ')" = $# ]; }

# Runs apt-get as root; what it says is shown only if it fails.
apt_get() {
    local log status=0
    log=$(mktemp)
    "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q "$@" >"$log" 2>&1 || status=$?
    [ "$status" = 0 ] || cat "$log"
    rm "$log"
    return "$status"
}

# Can this user become root? Finds out once, asking for a password if there is somebody to ask.
may_be_root() {
    [ "$(id -u)" = 0 ] && return
    root=(sudo)
    have sudo && { sudo -n true 2>/dev/null || { [ -t 0 ] && sudo true; }; }
}

# The guest is made of packages too, which are unpacked and never installed.
guest_can_be_had() { [ -e "${PAGEKIT_CACHE:-.cache}/guest/stamp.json" ] || apt_knows linux-image-cloud-amd64; }

install_packages() {
    local needed wanted missing lists=good root=()
    mapfile -t needed < <(needed_packages | tr ' ' '\n')
    mapfile -t wanted < <(wanted_packages | tr ' ' '\n')
    missing=("${needed[@]}" "${wanted[@]}")
    if [ "${#missing[@]}" = 0 ] && [ -e "${PAGEKIT_CACHE:-.cache}/guest/stamp.json" ]; then
        return
    fi
    have apt-get || die "not found, and there is no apt-get to install it with: ${missing[*]:-the guest}" \
        "install what these packages of Debian have, or use Debian 12"
    apt_knows "${missing[@]}" && guest_can_be_had || lists=stale
    [ "$lists" = stale ] || [ "${#missing[@]}" != 0 ] || return 0

    local install=(apt-get install -y --no-install-recommends --no-remove "${missing[@]}")
    if ! may_be_root; then
        if [ "${#needed[@]}" = 0 ] && guest_can_be_had; then
            say "going on without ${wanted[*]}, which only root can install"
            return
        fi
        local ask="apt-get update"
        [ "${#missing[@]}" = 0 ] || ask+=" && ${install[*]}"
        die "packages are missing, and only root can get them" "ask an administrator to run: $ask"
    fi

    if [ "$lists" = stale ]; then
        say "fetching the lists of packages"
        apt_get update || die "apt-get update failed"
    fi
    [ "${#missing[@]}" != 0 ] || return 0
    say "installing ${missing[*]}"
    if ! apt_get "${install[@]:1}"; then
        say "trying again with new lists of packages"
        apt_get update && apt_get "${install[@]:1}" || die "apt-get could not install ${missing[*]}" \
            "if that is because of another rustc: remove it, or install Rust with rustup"
    fi
    rust_is_new_enough || die "$(rustc --version), first in PATH, is too old" \
        "put /usr/bin, where a newer one is now, before it"
}

# ---- 2. the environment

# What the installed package was made from.
fingerprint() {
    find pyproject.toml Cargo.toml Cargo.lock crates python scripts/setup.sh -type f \
        ! -name '*.so' ! -name '*.pyc' ! -name pagekitd ! -path '*.egg-info/*' ! -path 'crates/*/tests/*' -print0 |
        LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum
}

# The versions that pyproject.toml pins for the tests, without building pagekit again to get them.
test_requirements() {
    "$python" -c 'import tomllib
print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["test"])'
}

# The stamp is written last and removed before anything is changed: without it, or with an
# interpreter that has moved, the environment is made anew.
make_environment() {
    local stamp=.venv/complete interpreter source tools
    interpreter="$python $("$python" -c 'import sys; print(sys.version.split()[0])')"
    source=$(fingerprint)
    local made="" built="" equipped=""
    [ ! -e "$stamp" ] || { read -r made && read -r built && read -r equipped; } <"$stamp" || true
    if [ "$made" != "$interpreter" ] || ! .venv/bin/python -c '' 2>/dev/null; then
        [ ! -e .venv ] || say "removing a .venv that is not whole or not of this Python"
        rm -rf .venv
        say "making .venv with $python"
        "$python" -m venv .venv
        built="" equipped=""
    fi
    tools=$equipped
    [ "$purpose" != test ] || tools=$(test_requirements)
    [ "$built" != "$source" ] || [ "$equipped" != "$tools" ] || return 0
    rm -f "$stamp"
    if [ "$built" != "$source" ]; then
        say "building and installing pagekit"
        # What setuptools left there would be installed again, files deleted since included.
        rm -rf build
        .venv/bin/pip install --disable-pip-version-check .
    fi
    if [ "$equipped" != "$tools" ]; then
        say "installing ${tools}"
        # shellcheck disable=SC2086  # a list
        .venv/bin/pip install --disable-pip-version-check $tools
    fi
    printf '%s\n' "$interpreter" "$source" "$tools" >"$stamp"
}

# ---- all of it

[ -n "${PYTHON:-}" ] && ! find_python >/dev/null &&
    die "PYTHON=$PYTHON is not a Python >= 3.11 that can make virtual environments"
install_packages
python=$(find_python)
make_environment
.venv/bin/python -c 'import sys; from pagekit.sandbox.guest import main; sys.exit(main())' >/dev/null
