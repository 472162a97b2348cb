#!/bin/sh
# Makes a node's own world and stays in it as its first process. `keeper.py` runs it as root:
#   namespace.sh outer CGROUP MACHINE HOME KUBELET
# CGROUP: name of a directory that exists in every cgroup hierarchy. MACHINE: the read-only root directory.
# HOME: of this node: root/ (empty), var/ (its disk), etc/ (its settings). KUBELET: the folder with its binary.
# Nothing here outlives the first process, and nothing is visible outside: the mounts are in a namespace of their own.
set -eu
stage=$1 cgroup=$2 machine=$3 home=$4 kubelet=$5

if [ "$stage" = outer ]; then
  for hierarchy in /sys/fs/cgroup/*/; do
    [ -L "${hierarchy%/}" ] || echo 0 > "$hierarchy$cgroup/cgroup.procs"
  done
  exec unshare --mount --net --pid --ipc --uts --cgroup --fork --kill-child -- \
    /bin/sh "$0" inner "$cgroup" "$machine" "$home" "$kubelet"
fi

root=$home/root
mount --bind "$machine" "$root"
mount -o remount,bind,ro "$root"
mount -t tmpfs -o mode=0755 tmpfs "$root/run"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mount --bind "$home/var" "$root/var"
mount --bind "$home/etc" "$root/etc/node"
mount --bind "$home/etc/cni" "$root/etc/cni/net.d"
mount --bind "$kubelet" "$root/opt/kubelet"
mount --rbind /dev "$root/dev"

# The kernel's settings are the machine's, not ours: all but those of our network namespace can be read only. Those that the
# kubelet insists on, and forwarding, which the bridge plugin turns on, are files that already say what they want to see.
mount -t proc proc "$root/proc"
mount --bind "$root/proc/sys" "$root/proc/sys"
mount -o remount,bind,ro "$root/proc/sys"
mount --bind "$root/proc/sys/net" "$root/proc/sys/net"
mount -o remount,bind,rw "$root/proc/sys/net"
mkdir "$root/run/settings"
for setting in vm/overcommit_memory=1 vm/panic_on_oom=0 kernel/panic=10 kernel/panic_on_oops=1 \
    kernel/keys/root_maxkeys=1000000 kernel/keys/root_maxbytes=25000000 net/ipv4/ip_forward=1; do
  path=${setting%=*}
  file=$root/run/settings/$(echo "$path" | tr / .)
  echo "${setting#*=}" > "$file"
  mount --bind "$file" "$root/proc/sys/$path"
done

mount -t sysfs -o ro sysfs "$root/sys"
mount -t tmpfs -o mode=0755 cgroup "$root/sys/fs/cgroup"
for hierarchy in /sys/fs/cgroup/*; do
  mine=$root$hierarchy
  if [ -L "$hierarchy" ]; then
    cp -P "$hierarchy" "$mine"
  else
    mkdir "$mine"
    mount --bind "$hierarchy/$cgroup" "$mine"
  fi
done

cd "$root"
pivot_root . .
umount -l .
mount --make-rshared /
exec /usr/bin/pause
