#!/usr/bin/env bash
# Shows the request, its slices and the job on every worker: status.sh --name=NAME --zone=ZONE --project=PROJECT [--job=JOB]
#   --limit   seconds after which a look is given up (default 120, and five times that on the workers; 0: never)

set -euo pipefail
. "$(dirname "$0")/settings.sh"

settings "$cloud" "$@"
check_cloud
need_gcloud
if [ -n "$opt_dry_run" ]; then
  state
  node_states
  report
  exit
fi
found=$(state)
printf 'request %s: %s\n' "$opt_name" "$found"
[ "$found" = ACTIVE ] || exit 0
node_states
report
