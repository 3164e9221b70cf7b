/* Echoes every UDP datagram that arrives at NIC 0, once its link is up. Swapping two addresses does
   not change a checksum. */
#include "virtio.h"

/* The first NIC's, behind the slots for disks. */
static u32 slot;
#define BUFFERS 8
#define ROOM 2048
/* struct virtio_net_hdr (virtio 1.3, 5.1.6), then the frame. */
#define HEADER 12
#define NEEDS_CSUM 1
#define ETHERNET (HEADER + 14)
#define UDP (ETHERNET + 20)

enum { RECEIVE, TRANSMIT };

static struct queue queues[2];
static volatile u8 buffers[BUFFERS][ROOM] __attribute__((aligned(4096)));

static void swap(volatile u8 *one, volatile u8 *other, u32 count)
{
    while (count--) {
        u8 byte = *one;
        *one++ = *other;
        *other++ = byte;
    }
}

static bool is_udp(const volatile u8 *buffer, u32 length)
{
    return length >= UDP + 8 && buffer[HEADER + 12] == 8 && buffer[HEADER + 13] == 0 &&
           buffer[ETHERNET] == 0x45 && buffer[ETHERNET + 9] == 17;
}

static void answer(volatile u8 *buffer, u32 length)
{
    /* A checksum that the sender left to the device is left to it here, too: flags, csum_start and
       csum_offset of the header stay. */
    buffer[0] &= NEEDS_CSUM;
    for (u32 i = 1; i < HEADER; i++)
        if (!buffer[0] || i < 6 || i > 9)
            buffer[i] = 0;
    swap(buffer + HEADER, buffer + HEADER + 6, 6);
    swap(buffer + ETHERNET + 12, buffer + ETHERNET + 16, 4);
    swap(buffer + UDP, buffer + UDP + 2, 2);
    describe(&queues[TRANSMIT], 0, buffer, length, 0, 0);
    offer(slot, TRANSMIT, &queues[TRANSMIT], 0);
    enum outcome outcome = await(slot, &queues[TRANSMIT], LONG);
    if (outcome != USED)
        say("WRONG a frame is not sent: outcome", outcome);
}

void guest(const char *word)
{
    (void)word;
    struct queue *receive = &queues[RECEIVE];
    slot = in_a_row(0, DISK);
    if (!negotiate(slot, EVERY))
        say("WRONG no features: status", get(slot, STATUS));
    place(slot, RECEIVE, receive);
    place(slot, TRANSMIT, &queues[TRANSMIT]);
    set(slot, STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    for (u16 i = 0; i < BUFFERS; i++) {
        describe(receive, i, buffers[i], ROOM, WRITE, 0);
        offer(slot, RECEIVE, receive, i);
    }
    print("ready\n");
    for (;;) {
        if (receive->used.index == receive->seen) {
            relax();
            continue;
        }
        barrier();
        u32 id = receive->used.ring[receive->seen % SIZE].id;
        u32 length = receive->used.ring[receive->seen % SIZE].length;
        receive->seen++;
        if (id >= BUFFERS || length < HEADER || length > ROOM) {
            say("WRONG a buffer comes back with length", length);
            halt();
        }
        if (is_udp(buffers[id], length))
            answer(buffers[id], length);
        offer(slot, RECEIVE, receive, (u16)id);
    }
}
