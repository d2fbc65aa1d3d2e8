#!/usr/bin/env bash
# Usage: scripts/reproduce_small.sh DIR [OPTION of scripts/sweep.sh]...
#
# Short for `scripts/table.sh small DIR`, the whole story in 15 runs on two CPU cores: see scripts/table.sh --help.
source "$(dirname "$0")/environment.sh"
exec "$root/scripts/table.sh" small "$@"
