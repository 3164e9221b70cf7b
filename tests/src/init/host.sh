#!/bin/sh
# Init of the emulated host: loads KVM, mounts the payload and the scratch disk, and runs its
# job on the console that leads outside.
export PATH=/bin HOME=/
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
while read -r module; do insmod "/modules/$module"; done < /modules/order
mount -o ro /dev/vda /host && mount /dev/vdb /host/scratch
for dir in dev proc sys; do mount --bind "/$dir" "/host/$dir"; done
mkdir -p /dev/net
[ -e /dev/net/tun ] || mknod /dev/net/tun c 10 200
mount -t tmpfs tmpfs /host/tmp
ip link set lo up
# Bytes pass unchanged in both directions, as long as a process holds the terminal open.
exec 3<> /dev/hvc0
stty raw -echo < /dev/hvc0
setsid chroot /host /bin/sh -c 'exec /bin/sh /run-me < /dev/hvc0 > /dev/hvc0 2>&1'
code=$?
printf '\036{"exit":%d}\n' "$code" > /dev/hvc0
umount /host/scratch
poweroff -f
