/* Fills the queue of every disk with requests to zero 64 MiB, and keeps it full. It does not agree on
   flushes, so that each has to be on the medium before it is answered. */
#include "virtio.h"

#define WRITE_ZEROES 13
#define SECTORS (64u << 11)

static struct queue queues[DISKS];
static volatile struct {
    u32 type;
    u32 reserved;
    u64 sector;
} header = {.type = WRITE_ZEROES};
static volatile struct {
    u64 sector;
    u32 count;
    u32 flags;
} range = {.count = SECTORS};
static volatile u8 status;

void guest(const char *word)
{
    (void)word;
    bool there[DISKS] = {false};
    for (u32 slot = 0; slot < DISKS; slot++) {
        struct queue *queue = &queues[slot];
        there[slot] = get(slot, CONFIG) >= SECTORS && drive(slot, F_VERSION_1, queue);
        describe(queue, 0, &header, sizeof header, NEXT, 1);
        describe(queue, 1, &range, sizeof range, NEXT, 2);
        describe(queue, 2, &status, 1, WRITE, 0);
        /* One chain, as often as there is room: nothing forbids it. */
        for (u32 i = 0; i < SIZE; i++)
            queue->available.ring[i] = 0;
    }
    print("flooding\n");
    for (;;)
        for (u32 slot = 0; slot < DISKS; slot++) {
            u16 full = (u16)(queues[slot].used.index + SIZE);
            if (!there[slot] || queues[slot].available.index == full)
                continue;
            barrier();
            queues[slot].available.index = full;
            barrier();
            set(slot, QUEUE_NOTIFY, 0);
        }
}
