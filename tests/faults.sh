#!/usr/bin/env bash
# Faults, by the hundred, on real stages: kills, full disks, damaged files, second starts. A table at the end.
#
#   bash tests/faults.sh            all, by hand: over an hour on 2 cores, by estimate
#   bash tests/faults.sh short      a few of each kind, 53 s of CPU: for CI
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHONPATH=.:tests exec "${PYTHON:-.venv/bin/python}" tests/faults.py "$@"
