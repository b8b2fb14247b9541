#!/bin/bash
# Proves on a Debian 12 made from nothing what README promises of one: scripts/bare.sh STEP...
#
#   refused   a user without root and sudo is told what to ask for, and nothing is half done
#   sudo      that user, now with sudo, gets everything set up
#   demo      `make demo`, as root
#   again     `make demo ARGS=--json`: quick this time, and one JSON object on standard output
#   test      `make test`
#
# What is tried is the last commit. The system is a directory with a chroot in it; its mounts are made
# in a mount namespace and its processes in a pid namespace, so that both end with this script, however
# that ends. Mirrors, proxies and certificates are taken from this machine's configuration.
# PAGEKIT_BARE_DIR is where the directory is made (/var/tmp; 4 GB).
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '\n== bare: %s\n' "$*" >&2; }
die() { echo "error: $1" >&2; [ -z "${2:-}" ] || echo "hint: $2" >&2; exit 1; }

outside() {
    [ "$(id -u)" = 0 ] || die "making a chroot needs root" "sudo make bare"
    command -v debootstrap >/dev/null || die "debootstrap not found" "apt-get install -y debootstrap"
    local changed
    changed=$(git status --porcelain | wc -l)
    [ "$changed" = 0 ] || say "the last commit is tried, without the $changed files changed since"
    root=$(mktemp -d "${PAGEKIT_BARE_DIR:-/var/tmp}/pagekit-bare-XXXXXX")
    trap 'rm -rf --one-file-system "$root"' EXIT
    # Not exec: the directory goes when the namespaces, and the mounts with them, are gone.
    unshare --mount --propagation private --pid --fork --kill-child --mount-proc \
        "$0" --inside "$root" "$@"
}

inside() {
    root=$1
    shift
    make_system
    local summary=() started step
    for step in "$@"; do
        say "$step"
        started=$SECONDS
        "step_$step" || die "failed: $step, after $((SECONDS - started)) s"
        summary+=("$(printf '%-10s %4d s' "$step" $((SECONDS - started)))")
    done
    say "done, on $(nproc) processors"
    printf '%s\n' "${summary[@]}" >&2
}

# ---- the system

make_system() {
    say "making a Debian 12 in $root"
    chmod 755 "$root" # it becomes the root directory of users too
    # REPO_URI of every index that apt uses here and that is Debian's own.
    local format='$(ORIGIN)|$(CODENAME)|deb $(REPO_URI) $(RELEASE) $(COMPONENT)' mirror
    apt-get indextargets --format "$format" 'Created-By: Packages' |
        sed -n 's/^Debian|bookworm[^|]*|//p' | sort -u >"$root/sources"
    mirror=$(awk '$3 == "bookworm" { print $2; exit }' "$root/sources")
    [ -n "$mirror" ] || die "apt on this machine knows no mirror of Debian 12" "apt-get update"
    debootstrap --variant=minbase --include=ca-certificates bookworm "$root" "$mirror" >&2
    mv "$root/sources" "$root/etc/apt/sources.list"

    # How this machine reaches the rest of the world.
    apt-config dump Acquire | grep -v IndexTargets >"$root/etc/apt/apt.conf.d/90this-machine"
    mkdir -p "$root/root/.config/pip" "$root/root/.cargo" "$root/usr/local/share/ca-certificates"
    local file
    while read -r file copy; do
        [ ! -e "$file" ] || cp -L "$file" "$root$copy"
    done <<-FILES
		/etc/resolv.conf /etc/resolv.conf
		/etc/hosts /etc/hosts
		/etc/pip.conf /etc/pip.conf
		$HOME/.config/pip/pip.conf /root/.config/pip/pip.conf
		${CARGO_HOME:-$HOME/.cargo}/config.toml /root/.cargo/config.toml
	FILES
    find /usr/local/share/ca-certificates -name '*.crt' -exec cp -t "$root/usr/local/share/ca-certificates" {} +
    run update-ca-certificates >&2

    mount -t proc proc "$root/proc"
    mount --rbind /sys "$root/sys"
    mount -t tmpfs -o mode=1777 shm "$root/dev/shm"
    mount -t devpts -o newinstance,ptmxmode=0666,mode=620 pts "$root/dev/pts"
    local device
    for device in kvm userfaultfd fuse; do
        if [ -e "/dev/$device" ]; then
            : >"$root/dev/$device"
            mount --bind "/dev/$device" "$root/dev/$device"
        fi
    done

    run apt-get update -q >&2
    say "the first line of set-up: apt-get install -y git make"
    run apt-get install -y -q git make >&2
    git bundle create --quiet "$root/root/pagekit.bundle" HEAD
    run git clone --quiet -c advice.detachedHead=false /root/pagekit.bundle /root/pagekit
}

# Runs a command in the system, with nothing of this one's environment but how to reach the world.
run() {
    local name environment=(PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
        HOME=/root LANG=C.UTF-8 DEBIAN_FRONTEND=noninteractive "TERM=${TERM:-dumb}")
    for name in $(compgen -e | grep -E -i \
        '^((https?|ftp|all|no)_proxy|pip_.*|cargo_(http|net|registr(y|ies)|source)_.*|.*ssl_cert_.*|(curl|requests)_ca_bundle)$'); do
        environment+=("$name=${!name}")
    done
    chroot "$root" env -i "${environment[@]}" "$@"
}

# ---- what is proven

as_root() { run env --chdir=/root/pagekit "$@"; }

as_user() {
    run setpriv --reuid somebody --regid somebody --init-groups \
        env --chdir=/home/somebody/pagekit HOME=/home/somebody "$@"
}

step_refused() {
    run useradd --create-home somebody
    run git clone --quiet -c advice.detachedHead=false /root/pagekit.bundle /home/somebody/pagekit
    run chown -R somebody: /home/somebody/pagekit
    local said status=0
    said=$(as_user make demo 2>&1) || status=$?
    echo "$said" >&2
    [ "$status" != 0 ] || die "make demo succeeded without the packages it needs"
    grep -q 'apt-get install -y' <<<"$said" || die "it did not say what to ask an administrator for"
    [ -z "$(as_user git status --porcelain --ignored)" ] || die "something is half done"
}

step_sudo() {
    run apt-get install -y -q --no-install-recommends sudo >&2
    echo 'somebody ALL=(ALL) NOPASSWD: ALL' >"$root/etc/sudoers.d/somebody"
    as_user make setup
}

step_demo() { as_root make demo; }

step_again() {
    as_root make demo ARGS=--json >"$root/root/demo.json"
    run python3 -c 'import json; print("one JSON object:", *json.load(open("/root/demo.json")))' >&2
}

step_test() { as_root make test; }

if [ "${1:-}" = --inside ]; then
    shift
    inside "$@"
else
    [ $# != 0 ] || set -- refused demo again test
    outside "$@"
fi
