/* Reports hot-plug of disks and NICs. At each configuration change interrupt it prints the slot and
   its contents: for a disk the first word of sector 3 and that of the last sector, read by
   requests. It does the same when a digit (a disk's slot) or a letter (a NIC's) is typed. "polled"
   only reads the registers. */
#include "virtio.h"

enum { CONFIG_CHANGED = 2 };

static struct queue queues[SLOTS_MAX];
static struct queue transmit[SLOTS_MAX];

/* The number of slots for disks, which come first, and of all slots. */
static u32 disks, slots;

static volatile struct {
    u32 type;
    u32 reserved;
    u64 sector;
} header;
static volatile u64 data[64];
static volatile u8 status;

/* VIRTIO_IRQS of machine/src/layout.rs. */
static const u32 pins[SLOTS_MAX] = {5,  6,  7,  10, 11, 12, 14, 15, 16,
                                    17, 18, 19, 20, 21, 22, 23, 13, 3};

/* A vector for each slot's next interrupt: one that is pending stays so, as it is not taken. */
static u8 vectors[SLOTS_MAX];

static void rearm(u32 slot)
{
    static u8 next = 0x30;
    vectors[slot] = next++;
    route(pins[slot], vectors[slot]);
}

static u64 capacity(u32 slot)
{
    /* Two halves of one value (virtio 1.3, 4.2.2.2). */
    for (;;) {
        u32 generation = get(slot, GENERATION);
        u64 sectors = get(slot, CONFIG) | (u64)get(slot, CONFIG + 4) << 32;
        if (get(slot, GENERATION) == generation)
            return sectors;
    }
}

static void begin(u32 slot)
{
    if (!negotiate(slot, EVERY))
        say("WRONG no features in slot", slot);
    place(slot, 0, &queues[slot]);
    if (slot >= disks)
        place(slot, 1, &transmit[slot]);
    set(slot, STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    if (get(slot, STATUS) & NEEDS_RESET)
        say("WRONG a reset is needed in slot", slot);
}

static void show_sector(u32 slot, u64 sector)
{
    header.type = 0;
    header.sector = sector;
    status = 0xff;
    data[0] = 0;
    describe(&queues[slot], 0, &header, 16, NEXT, 1);
    describe(&queues[slot], 1, data, 512, NEXT | WRITE, 2);
    describe(&queues[slot], 2, &status, 1, WRITE, 0);
    offer(slot, 0, &queues[slot], 0);
    enum outcome outcome = await(slot, &queues[slot], LONG);
    print(" sector ");
    print_number(sector);
    if (outcome == USED && status == 0) {
        print(" begins with ");
        print_number(data[0]);
    } else if (outcome == USED) {
        print(" has status ");
        print_number(status);
    } else {
        print(" WRONG outcome");
    }
}

static void show(u32 slot)
{
    if (slot < disks) {
        print("disk ");
        print_number(slot);
        print(" has ");
        u64 sectors = capacity(slot);
        print_number(sectors);
        print(" sectors");
        show_sector(slot, 3);
        if (sectors)
            show_sector(slot, sectors - 1);
        print("\n");
    } else {
        print("nic ");
        print_number(slot - disks);
        print(get(slot, CONFIG + 4) >> 16 & 1 ? " is up " : " is down ");
        for (u32 i = 0; i < 6; i++) {
            u8 byte = read8(at(slot, CONFIG + i));
            if (byte < 16)
                print("0");
            print_number(byte);
        }
        print("\n");
    }
}

void guest(const char *word)
{
    bool polled = same(word, "polled");
    u64 before[SLOTS_MAX];
    disks = in_a_row(0, DISK);
    slots = disks + in_a_row(disks, NIC);
    for (u32 slot = 0; slot < slots; slot++) {
        if (!polled)
            rearm(slot);
        begin(slot);
        before[slot] = capacity(slot);
    }
    print("ready\n");
    for (;;) {
        if (in8(SERIAL + 5) & 1) {
            u32 key = (u32)take();
            if (key - '0' < disks)
                show(key - '0');
            if (key - 'a' < slots - disks)
                show(disks + key - 'a');
        }
        for (u32 slot = 0; slot < slots; slot++) {
            if (polled) {
                u64 now = capacity(slot);
                if (now == before[slot])
                    continue;
                before[slot] = now;
            } else {
                if (!pending(vectors[slot]))
                    continue;
                /* In this order: an interrupt that comes meanwhile uses the next vector. */
                rearm(slot);
                u32 why = get(slot, INTERRUPT_STATUS);
                set(slot, INTERRUPT_ACK, why);
                if (!(why & CONFIG_CHANGED))
                    continue;
            }
            show(slot);
        }
    }
}
