"""Is the network of a Pod held already? Tried from inside, before the task's command may do anything.

A Pod has an address and runs before its network plugin has learned of it, and where no plugin enforces NetworkPolicies it is
never held. So we connect to something that none of our policies lets through, the canary, until that fails. git does it, for every
image has it, and its trace says whether there was a connection, however that ended.
"""

from __future__ import annotations

import shlex

API_SERVER, OFF = "api-server", "off"
PATIENCE = 10.0  # seconds that a network plugin may take, by the Pod's clock
# The last line of what is printed: held, reached, or git's own words, which mean neither.
_SCRIPT = """
case $host in *:*) host="[$host]";; esac
cd / && end=$(($(date +%s) + {patience}))
while :; do
  said=$(LC_ALL=C GIT_CONFIG_NOSYSTEM=1 GIT_CONFIG_GLOBAL=/dev/null GIT_ALLOW_PROTOCOL=git GIT_TRACE_PACKET=1 \\
    timeout 1 git ls-remote "git://$host:$port/" 2>&1 > /dev/null < /dev/null)
  code=$?
  case $code,$said in
    *git-upload-pack*) ;;
    124,* | *"unable to connect to"*) exit 0;;
    *) echo "$host:$port could not be tried: $said" >&2; exit 1;;
  esac
  [ "$(date +%s)" -lt "$end" ] || break
  sleep 0.1
done
echo "it still reaches $host:$port, which its egress does not allow" >&2
exit 1
"""


def trial(canary: str) -> str | None:
    """The script that ends well when the canary is out of reach, and otherwise says why not; None when nothing is to be tried."""
    if canary == OFF:
        return None
    if canary == API_SERVER:
        # What every kubelet tells every container.
        place = "host=${KUBERNETES_SERVICE_HOST:?is not set} port=${KUBERNETES_SERVICE_PORT:?is not set}"
    else:
        host, _, port = canary.rpartition(":")
        place = f"host={shlex.quote(host.strip('[]'))} port={shlex.quote(port)}"
    return place + _SCRIPT.format(patience=round(PATIENCE))
