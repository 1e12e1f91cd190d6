#!/usr/bin/env bash
# Starts a job on every worker, detached: run.sh --name=NAME --zone=ZONE --project=PROJECT [--job=JOB] -- ARGS
# ARGS are those of `python -m jaxcl.main`, and reach it as they are:
#   run.sh ... -- --config=configs/pod.py:1b --workdir=/mnt/runs/1b
# Output goes to ~/jaxcl-jobs/JOB/log on each worker (logs.sh). A run that is found in the workdir continues.

set -euo pipefail
. "$(dirname "$0")/settings.sh"

settings "$cloud" "$@"
check_cloud job
[ -n "$has_job" ] || die 'the job: missing; write -- --config=FILE --workdir=/mnt/runs/NAME'
check_job
need_gcloud
remember
on_workers "$(worker start "$opt_job" "${job_args[@]}")"
