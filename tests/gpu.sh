#!/bin/sh
# Prove and measure on a GPU what only a GPU can show: tests marked gpu, then tests/gpu.py.
# GPU_TEST_DEVICE=cpu tries all of it on a CPU at tiny sizes.
cd "$(dirname "$0")/.." || exit 1
python -m pytest -q -m gpu tests/test_gpu.py
tests=$?
PYTHONPATH=. python tests/gpu.py
measured=$?
test $tests -eq 0 && test $measured -eq 0
