#!/usr/bin/env bash
# Goes on with a job: resume.sh --name=NAME --zone=ZONE --project=PROJECT [--job=JOB]
# What still runs of it is stopped first, with its state saved; then the arguments of run.sh are used again.

set -euo pipefail
. "$(dirname "$0")/settings.sh"

settings "$cloud" "$@"
check_cloud
need_gcloud
recall
check_job
end_job halt
on_workers "$(worker start "$opt_job" "${job_args[@]}")"
