#!/usr/bin/env bash
# Usage: scripts/reproduce_small.sh DIR [OPTION of scripts/sweep.sh]...
#
# Short for `scripts/table.sh small DIR`, 15 runs of five settings on two CPU cores: see scripts/table.sh --help.
source "$(dirname "$0")/environment.sh"
exec "$root/scripts/table.sh" small "$@"
