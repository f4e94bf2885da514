# shellcheck shell=bash
# What the scripts that build something begin with.  Sourced, not run.
#
# Goes to the root of the tree, finds cargo or installs Rust, and sets `target`, where
# builds go.
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." || exit

die() { echo "${0##*/}: $*" >&2; exit 1; }

# Runs a step and says how long it took.
step() {
    local name=$1 started=$SECONDS
    shift
    echo "==> $name"
    "$@"
    echo "==> $name: $((SECONDS - started)) s"
}

PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin
if ! command -v cargo >/dev/null && [[ -n ${SUDO_USER-} ]]; then
    # Whoever called sudo may have a Rust where root has none.
    sudo_home=$(getent passwd "$SUDO_USER" | cut -d: -f6)
    PATH=$PATH:$sudo_home/.cargo/bin
    export RUSTUP_HOME=${RUSTUP_HOME:-$sudo_home/.rustup}
fi
command -v cargo >/dev/null || scripts/install-deps --rust ||
    die "there is no cargo; install Rust 1.95 or later, from https://rustup.rs"

# shellcheck disable=SC2034 # Those that source this use it.
target=$(realpath -m -- "${CARGO_TARGET_DIR:-target}")
