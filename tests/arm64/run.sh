#!/usr/bin/env bash
# The kernels' tests and the golden logits on an emulated 64-bit ARM CPU: with i8mm, with dotprod only, with neither.
#
#     tests/arm64/run.sh [pytest arguments]              everything, on each of the three CPUs (80 minutes)
#     LEVELS=neon-dotprod tests/arm64/run.sh -k words    one CPU, some tests
#
# Needs a Debian or Ubuntu host with apt-get, dpkg and pip; not root. An arm64 Python with its libraries (Debian packages)
# and wheels are unpacked below ~/.cache/lfm2cpp/arm64 (or LFM2CPP_ARM64_DIR); nothing is installed.
set -euo pipefail
REPO=$(cd "$(dirname "$0")/../.." && pwd)
ROOM=${LFM2CPP_ARM64_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/lfm2cpp/arm64}
ROOT=$ROOM/root WHEELS=$ROOM/wheels
LEVELS=${LEVELS:-neon-i8mm neon-dotprod generic}
declare -A CPUS=([neon-i8mm]=max [neon-dotprod]=cortex-a76 [generic]=cortex-a72)
TESTS=(tests/test_kernels_{words,mul_mat,ops,attention,sample}.py tests/test_engine_{golden,laws}.py)

apt_arm64() {
    mkdir -p "$ROOM"/apt/{state/lists/partial,cache/archives/partial}
    touch "$ROOM/apt/status"
    apt-get -qq -oAPT::Architecture=arm64 -oAPT::Architectures=arm64 -oDir::State="$ROOM/apt/state" \
        -oDir::State::status="$ROOM/apt/status" -oDir::Cache="$ROOM/apt/cache" -oDebug::NoLocking=1 "$@"
}

fetch_emulator() {
    command -v qemu-aarch64-static && return
    if [ ! -x "$ROOM/qemu/usr/bin/qemu-aarch64-static" ]; then
        mkdir -p "$ROOM/qemu"
        (cd "$ROOM/qemu" && apt-get -qq download qemu-user-static && dpkg -x qemu-user-static_*.deb . && rm ./*.deb) >&2
    fi
    echo "$ROOM/qemu/usr/bin/qemu-aarch64-static"
}

fetch_python() {
    [ -e "$ROOT/done" ] && return
    mkdir -p "$ROOT"
    apt_arm64 update
    apt_arm64 install --download-only --no-install-recommends -y python3 libstdc++6
    for package in "$ROOM"/apt/cache/archives/*.deb; do dpkg -x "$package" "$ROOT"; done
    # Where / is not merged into /usr in the packages, the loader's path is a link.
    [ -e "$ROOT/lib" ] || ln -s usr/lib "$ROOT/lib"
    touch "$ROOT/done"
}

fetch_wheels() { # $1: Python's version
    [ -e "$WHEELS/done" ] && return
    mkdir -p "$WHEELS" "$ROOM/downloads"
    python3 -m pip download -q --only-binary=:all: --no-deps --python-version "$1" --implementation cp \
        --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux_2_17_aarch64 \
        --platform manylinux2014_aarch64 -d "$ROOM/downloads" \
        numpy numba llvmlite tqdm pyyaml gguf pytest pluggy iniconfig packaging pygments psutil
    for wheel in "$ROOM"/downloads/*.whl; do python3 -m zipfile -e "$wheel" "$WHEELS"; done
    touch "$WHEELS/done"
}

QEMU=$(fetch_emulator)
fetch_python
PYTHON=$(basename "$(ls -d "$ROOT"/usr/bin/python3.*[0-9])")
fetch_wheels "${PYTHON#python}"

cd "$REPO"
export QEMU_LD_PREFIX=$ROOT PYTHONPATH=$WHEELS:$REPO PYTHONDONTWRITEBYTECODE=1 OPENBLAS_NUM_THREADS=1
export LFM2CPP_CACHE_DIR=$ROOM/kernels
unset LFM2CPP_SIMD NUMBA_CPU_NAME NUMBA_CPU_FEATURES
for level in $LEVELS; do
    emulated=("$QEMU" -cpu "${CPUS[$level]}" "$ROOT/usr/bin/$PYTHON")
    found=$("${emulated[@]}" -c "from lfm2cpp.kernels import level; print(level.target().level.name)")
    echo "== ${CPUS[$level]}: $found"
    [ "$found" = "$level" ] || { echo "expected the level $level" >&2; exit 1; }
    "${emulated[@]}" -m pytest -q --noconftest -p no:cacheprovider "${TESTS[@]}" "$@"
done
