#!/bin/sh
# Init of the guests, in the initramfs and on a root disk: brings up what there is, prints how
# long the kernel took, and then runs commands from the console.
export PATH=/bin HOME=/ PS1='guest:\w# '
mount -t proc proc /proc
read -r booted _ < /proc/uptime
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev 2>/dev/null
echo "guest: init after $booted s"

if [ -e /modules ]; then
    while read -r module; do insmod "/modules/$module"; done < /modules/order
fi
if [ "$story" = disk ]; then
    # The root file system is on the disk: switch to it, and start again.
    mkdir /disk
    mount "$disk" /disk || echo "guest: cannot mount $disk"
    umount /proc /sys
    export story=
    exec switch_root -c /dev/console /disk /init
fi
ip link set lo up 2>/dev/null

# The power button ends the guest, as it does on any machine.
for event in /sys/class/input/event*; do
    if grep -q 'Power Button' "$event/device/name" 2>/dev/null; then
        # Not a child of this shell: the commands that it runs may wait for its children.
        (
            (head -c 24 "/dev/input/${event##*/}" > /dev/null && echo "guest: power button" && poweroff -f) &
        )
    fi
done

if [ "$story" = shell ]; then
    echo "guest: ready"
    # As large as the terminal that the console is shown in.
    [ -z "$rows" ] || stty rows "$rows" cols "$cols"
    setsid cttyhack sh
    poweroff -f
fi
stty -echo -onlcr
echo "guest: ready"
# A shell on a terminal would echo and prompt; this only runs commands.
while read -r line; do eval "$line"; done
poweroff -f
