#!/usr/bin/env bash
# Everything from a fresh machine: an environment in .venv, the style check, the tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || python3 -m venv .venv
# torch first and alone: some packages would otherwise bring another build of it
.venv/bin/pip install --quiet --disable-pip-version-check "$(grep '^torch==' requirements.txt)"
.venv/bin/pip install --quiet --disable-pip-version-check -r tests/requirements.txt
.venv/bin/ruff check .
exec .venv/bin/python -m pytest -q -n "${TEST_PROCESSES:-2}" --durations=5 "$@"
