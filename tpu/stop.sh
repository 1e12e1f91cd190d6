#!/usr/bin/env bash
# Stops a job with its state saved: stop.sh --name=NAME --zone=ZONE --project=PROJECT [--job=JOB] [--seconds=300]
# A process that has not saved within --seconds is killed. The machines stay, and cost: see delete.sh.

set -euo pipefail
. "$(dirname "$0")/settings.sh"

settings "$cloud seconds" "$@"
check_cloud
check_if_given seconds '[0-9]{1,5}' SECONDS
need_gcloud
end_job stop "${opt_seconds:-300}"
