#!/usr/bin/env bash
# Resolve every group against one set of versions, with hashes, for Python 3.11 to 3.13 on Linux and macOS.
set -euo pipefail
cd "$(dirname "$0")/.."
compile() { uv pip compile -q --universal --python-version 3.11 --no-emit-index-url --no-annotate --no-header "$@"; }
all=$(mktemp --suffix=.txt)
trap 'rm -f "$all"' EXIT
# What only torch's CUDA build asks for stays out of the locks with it.
cuda=(torch triton cuda-bindings cuda-pathfinder cuda-toolkit nvidia-cuda-cccl nvidia-cublas nvidia-cuda-cupti nvidia-cuda-nvrtc
  nvidia-cuda-runtime nvidia-cudnn-cu13 nvidia-cufft nvidia-cufile nvidia-curand nvidia-cusolver nvidia-cusparse
  nvidia-cusparselt-cu13 nvidia-nccl-cu13 nvidia-nvjitlink nvidia-nvshmem-cu13 nvidia-nvtx)
skip=()
for package in "${cuda[@]}"; do skip+=(--no-emit-package "$package"); done
# torch is pinned apart from the locks: its CPU build carries a local version tag that no lock can name portably.
compile pyproject.toml --extra ui --extra training --extra bench --extra serverless --extra dev "${skip[@]}" -o "$all"
compile pyproject.toml --generate-hashes -c "$all" -o requirements/api.txt
for group in ui training bench serverless dev; do
  compile pyproject.toml --extra "$group" --generate-hashes -c "$all" "${skip[@]}" -o "requirements/$group.txt"
done
compile <(echo 'setuptools>=77') --generate-hashes -o requirements/build.txt
# The images' C compiler, as a wheel: pinned like everything else in them, which apt's would not be.
compile <(echo 'ziglang>=0.15') --generate-hashes -o requirements/kernels.txt
compile requirements/infra.in --generate-hashes -o requirements/infra.txt
