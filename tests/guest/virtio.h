/* A driver of split virtqueues over virtio-mmio (virtio 1.3, 2.7 and 4.2): enough to use a device,
   and open enough to misuse it. Device memory is one to one with the guest's addresses. */
#pragma once
#include "guest.h"

/* Size of a queue in descriptors, unless the build defines another for a guest. */
#ifndef SIZE
#define SIZE 16
#endif
#define NEXT 1
#define WRITE 2
#define INDIRECT 4

#define ACKNOWLEDGE 1
#define DRIVER 2
#define DRIVER_OK 4
#define FEATURES_OK 8
#define NEEDS_RESET 0x40

#define F_INDIRECT (1ull << 28)
#define F_EVENT_IDX (1ull << 29)
#define F_VERSION_1 (1ull << 32)
/* All features that the device offers, as a complete driver accepts them. */
#define EVERY (~0ull)

enum {
    DEVICE_ID = 0x08,
    DEVICE_FEATURES = 0x10,
    DEVICE_FEATURES_SEL = 0x14,
    DRIVER_FEATURES = 0x20,
    DRIVER_FEATURES_SEL = 0x24,
    QUEUE_SEL = 0x30,
    QUEUE_SIZE_MAX = 0x34,
    QUEUE_SIZE = 0x38,
    QUEUE_READY = 0x44,
    QUEUE_NOTIFY = 0x50,
    INTERRUPT_STATUS = 0x60,
    INTERRUPT_ACK = 0x64,
    STATUS = 0x70,
    QUEUE_DESC = 0x80,
    QUEUE_DRIVER = 0x90,
    QUEUE_DEVICE = 0xa0,
    GENERATION = 0xfc,
    CONFIG = 0x100,
};

struct descriptor {
    u64 address;
    u32 length;
    u16 flags;
    u16 next;
};

struct queue {
    volatile struct descriptor table[SIZE];
    volatile struct {
        u16 flags;
        u16 index;
        u16 ring[SIZE];
        u16 used_event;
    } available __attribute__((aligned(4)));
    volatile struct {
        u16 flags;
        u16 index;
        struct {
            u32 id;
            u32 length;
        } ring[SIZE];
        u16 available_event;
    } used __attribute__((aligned(4)));
    u16 seen;
} __attribute__((aligned(256)));

/* The register at `offset` of slot `slot`. */
static inline u64 at(u32 slot, u32 offset)
{
    return VIRTIO + slot * 4096 + offset;
}
static inline u32 get(u32 slot, u32 offset)
{
    return read32(at(slot, offset));
}
static inline void set(u32 slot, u32 offset, u32 value)
{
    write32(at(slot, offset), value);
}

/* The devices of kind `id` in a row from slot `from` on; there is nothing behind the last slot. */
#define SLOTS_MAX 18
static inline u32 in_a_row(u32 from, u32 id)
{
    u32 count = 0;
    while (from + count < SLOTS_MAX && get(from + count, DEVICE_ID) == id)
        count++;
    return count;
}
enum { NIC = 1, DISK = 2 };

u64 offered(u32 slot);

/* Resets the device and negotiates `features` as far as they are offered, up to FEATURES_OK. */
bool negotiate(u32 slot, u64 features);

/* Gives the device an empty queue `index`. */
void place(u32 slot, u32 index, struct queue *queue);

/* The whole initialisation of a device with one queue, up to DRIVER_OK. */
bool drive(u32 slot, u64 features, struct queue *queue);

void describe(struct queue *queue, u16 number, const volatile void *address, u32 length, u16 flags,
              u16 next);

/* Makes the chain that begins with descriptor `head` available, requests an interrupt when it is
   used, and notifies the device. */
void offer(u32 slot, u32 index, struct queue *queue, u16 head);

/* The same without requesting an interrupt: `used_event` stays as it is. */
void submit(u32 slot, u32 index, struct queue *queue, u16 head);

enum outcome { USED, GAVE_UP, SILENT };

/* Waits until the device has used one more chain or needs a reset, for at most `limit` ticks. */
enum outcome await(u32 slot, struct queue *queue, u64 limit);

/* Routes interrupt `pin` to `vector` of the first processor, where it stays pending. */
void route(u32 pin, u8 vector);
bool pending(u8 vector);

/* Half a minute, in ticks, more or less: a busy host's disk can stall for long. */
#define LONG 100000000000ull
/* Some milliseconds. */
#define BRIEF 20000000ull
