/* See virtio.h. */
#include "virtio.h"

u64 offered(u32 slot)
{
    set(slot, DEVICE_FEATURES_SEL, 1);
    u64 high = get(slot, DEVICE_FEATURES);
    set(slot, DEVICE_FEATURES_SEL, 0);
    return high << 32 | get(slot, DEVICE_FEATURES);
}

bool negotiate(u32 slot, u64 features)
{
    set(slot, STATUS, 0);
    set(slot, STATUS, ACKNOWLEDGE);
    set(slot, STATUS, ACKNOWLEDGE | DRIVER);
    features &= offered(slot);
    for (u32 half = 0; half < 2; half++) {
        set(slot, DRIVER_FEATURES_SEL, half);
        set(slot, DRIVER_FEATURES, (u32)(features >> 32 * half));
    }
    set(slot, STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    return get(slot, STATUS) == (ACKNOWLEDGE | DRIVER | FEATURES_OK);
}

static void set_address(u32 slot, u32 offset, const volatile void *address)
{
    set(slot, offset, (u32)(u64)address);
    set(slot, offset + 4, (u32)((u64)address >> 32));
}

void place(u32 slot, u32 index, struct queue *queue)
{
    volatile u64 *word = (volatile u64 *)queue;
    for (u32 i = 0; i < sizeof *queue / 8; i++)
        word[i] = 0;
    set(slot, QUEUE_SEL, index);
    set(slot, QUEUE_SIZE, SIZE);
    set_address(slot, QUEUE_DESC, queue->table);
    set_address(slot, QUEUE_DRIVER, &queue->available);
    set_address(slot, QUEUE_DEVICE, &queue->used);
    set(slot, QUEUE_READY, 1);
}

bool drive(u32 slot, u64 features, struct queue *queue)
{
    if (!negotiate(slot, features))
        return false;
    place(slot, 0, queue);
    set(slot, STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    return get(slot, STATUS) == (ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
}

void describe(struct queue *queue, u16 number, const volatile void *address, u32 length, u16 flags,
              u16 next)
{
    volatile struct descriptor *to = &queue->table[number];
    to->address = (u64)address;
    to->length = length;
    to->flags = flags;
    to->next = next;
}

void offer(u32 slot, u32 index, struct queue *queue, u16 head)
{
    /* Without EVENT_IDX the device does not read it. */
    queue->available.used_event = queue->used.index;
    submit(slot, index, queue, head);
}

void submit(u32 slot, u32 index, struct queue *queue, u16 head)
{
    u16 next = queue->available.index;
    queue->available.ring[next % SIZE] = head;
    barrier();
    queue->available.index = (u16)(next + 1);
    barrier();
    set(slot, QUEUE_NOTIFY, index);
}

enum outcome await(u32 slot, struct queue *queue, u64 limit)
{
    u64 begin = ticks();
    do {
        if (queue->used.index != queue->seen) {
            barrier();
            queue->seen++;
            return USED;
        }
        if (get(slot, STATUS) & NEEDS_RESET)
            return GAVE_UP;
        relax();
    } while (ticks() - begin < limit);
    return SILENT;
}

void route(u32 pin, u8 vector)
{
    write32(LAPIC + 0xf0, 0x1ff);
    write32(IOAPIC, 0x10 + 2 * pin + 1);
    write32(IOAPIC + 0x10, 0);
    write32(IOAPIC, 0x10 + 2 * pin);
    write32(IOAPIC + 0x10, vector);
}

bool pending(u8 vector)
{
    return read32(LAPIC + 0x200 + vector / 32 * 16) >> vector % 32 & 1;
}
