#!/bin/sh
# usage: prune.sh VENV [PACKAGE...]   Takes out of an environment what a service never imports: test suites,
# C headers and sources, type stubs, pip itself, byte code, and the packages that are named. The warm-up that
# follows in the build proves that it still runs.
set -eu
venv=$1
shift
site=$(find "$venv/lib" -maxdepth 2 -name site-packages)
[ -d "$site" ] || { echo "error: there are no packages in $venv" >&2; exit 1; }
before=$(du -sm "$venv" | cut -f1)
for package in "$@"; do
  rm -r "${site:?}/$package" "$site/$package"-*.dist-info
  rm -rf "$site/$package.libs"
done
find "$site" -type d \( -name tests -o -name include \) -prune -exec rm -rf {} +
find "$site" -type f \( -name '*.pyi' -o -name '*.pxd' -o -name '*.pyx' -o -name '*.a' -o -name '*.h' -o -name '*.c' \
  -o -name '*.cpp' -o -name '*.f90' \) -delete
find "$site" -maxdepth 1 \( -name 'pip' -o -name 'pip-*' -o -name 'setuptools' -o -name 'setuptools-*' \
  -o -name 'pkg_resources' -o -name '_distutils_hack' -o -name 'distutils-precedence.pth' -o -name 'hf_xet*' \) \
  -exec rm -rf {} +
# ONNX Runtime's own tools for converting and quantizing models.
rm -rf "$site"/onnxruntime/transformers "$site"/onnxruntime/tools "$site"/onnxruntime/quantization \
  "$site"/onnxruntime/datasets "$site"/onnxruntime/backend
find "$venv/bin" -name 'pip*' -delete
find "$site" -type d -name __pycache__ -prune -exec rm -rf {} +
echo "pruned: ${before} MB -> $(du -sm "$venv" | cut -f1) MB"
