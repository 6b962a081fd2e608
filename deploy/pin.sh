#!/bin/bash
# Rewrites requirements files with the hashes of the wheels that their pins name, after a version was changed by hand.
#
#   deploy/pin.sh deploy/requirements-cpu.txt...
set -euo pipefail
report=$(mktemp)
trap 'rm -f "$report"' EXIT
python=${DELTANET_CACHE:-$HOME/.cache/deltanet}/venv/bin/python
for file in "$@"; do
  "$python" -m pip install --quiet --disable-pip-version-check --dry-run --ignore-installed --no-deps \
    --only-binary :all: --report "$report" -r <(grep -oE '^[A-Za-z0-9._-]+==[^ ]+' "$file")
  "$python" - "$report" "$file" <<'PYTHON'
import json, sys

with open(sys.argv[1]) as report:
    wheels = json.load(report)["install"]
with open(sys.argv[2]) as file:
    comments = [line for line in file if line.startswith("#")]
with open(sys.argv[2], "w") as file:
    file.writelines(comments)
    for wheel in sorted(wheels, key=lambda wheel: wheel["metadata"]["name"].lower()):
        file.write("{name}=={version} --hash=sha256:{hash}\n".format(
            **wheel["metadata"] | {"hash": wheel["download_info"]["archive_info"]["hashes"]["sha256"]}))
PYTHON
done
