#!/usr/bin/env bash
# Requests TPU slices: create.sh --name=NAME --zone=ZONE --project=PROJECT --accelerator=TYPE --runtime=VERSION --capacity=KIND
#   --accelerator       such as v5litepod-16 or v6e-64 (gcloud compute tpus accelerator-types list --zone=ZONE)
#   --runtime           such as v2-alpha-tpuv6e (gcloud compute tpus tpu-vm versions list --zone=ZONE)
#   --capacity          spot (cheap, may be taken back at any time), on-demand or reserved
#   --nodes             number of slices; above 1 it is a Multislice request (default 1)
#   --wait              give up if nothing was granted within e.g. 6h, so that a forgotten request costs nothing later
#   --service-account, --network, --subnetwork, --internal   (--internal: no external addresses; ssh goes through IAP)
#   --limit-long        seconds after which the call is given up (default 1800; 0: never)
#   --dry-run           show the command only
# What is granted costs money until delete.sh is run, idle or not.

set -euo pipefail
. "$(dirname "$0")/settings.sh"

settings "$cloud accelerator runtime capacity wait network subnetwork service-account" "$@"
check_cloud
check accelerator '[a-z0-9]+(-[a-z0-9]+)*' 'TYPE, such as v5litepod-16'
check runtime '[a-z0-9]+([.-][a-z0-9]+)*' 'VERSION, such as v2-alpha-tpuv6e'
check capacity 'spot|on-demand|reserved' 'spot, on-demand or reserved'
check_if_given wait '[1-9][0-9]*[smhd]' 'a duration such as 6h'
check_if_given network '[a-z][a-z0-9-]*' NETWORK
check_if_given subnetwork '[a-z][a-z0-9-]*' SUBNETWORK
check_if_given service-account '[a-z0-9-]+@[a-z0-9.-]+' 'NAME@PROJECT.iam.gserviceaccount.com'
need_gcloud

spec=(--accelerator-type="$opt_accelerator" --runtime-version="$opt_runtime")
if [ "$opt_nodes" = 1 ]; then
  spec+=(--node-id="$opt_name")
else
  spec+=(--node-count="$opt_nodes" --node-prefix="$opt_name")
fi
case $opt_capacity in
  spot) spec+=(--spot) ;;
  reserved) spec+=(--reserved) ;;
esac
[ -z "$opt_wait" ] || spec+=(--valid-until-duration="$opt_wait")
[ -z "$opt_network" ] || spec+=(--network="$opt_network")
[ -z "$opt_subnetwork" ] || spec+=(--subnetwork="$opt_subnetwork")
[ -z "$opt_service_account" ] || spec+=(--service-account="$opt_service_account")
[ -z "$opt_internal" ] || spec+=(--internal-ips)
queued create "$opt_name" "${spec[@]}"
