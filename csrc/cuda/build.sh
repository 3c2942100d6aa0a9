#!/usr/bin/env bash
# Compiles the CUDA kernels into the plain shared library $1, for sm_80, sm_89, sm_90 and newer.
set -euo pipefail
gencode=()
for arch in 80 89 90; do
  gencode+=("-gencode=arch=compute_$arch,code=sm_$arch")
done
"${NVCC:-nvcc}" -O3 -std=c++17 -shared -Xcompiler -fPIC --threads 0 "${gencode[@]}" \
  -gencode=arch=compute_90,code=compute_90 -o "$1" "$(dirname "$0")"/*.cu
