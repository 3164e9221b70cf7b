/* One request at a time on the disk in slot 0. */
#pragma once
#include "virtio.h"

enum { IN = 0, OUT = 1, FLUSH = 4, GET_ID = 8, DISCARD = 11, WRITE_ZEROES = 13 };
enum { OK = 0, IOERR = 1, UNSUPPORTED = 2, NOTHING = 0xff };

static struct queue queue;
static volatile struct {
    u32 type;
    u32 reserved;
    u64 sector;
} header;
static volatile u64 data[512] __attribute__((aligned(4096)));
static volatile u8 status;

static inline void fail(const char *what, u64 number)
{
    print("WRONG ");
    say(what, number);
    halt();
}

static inline void prepare(u32 type, u64 sector)
{
    header.type = type;
    header.reserved = 0;
    header.sector = sector;
    status = NOTHING;
}

/* The usual chain: header, `length` bytes of data, status. */
static inline void chain(u32 type, u64 sector, u32 length)
{
    prepare(type, sector);
    u16 direction = type == IN || type == GET_ID ? WRITE : 0;
    describe(&queue, 0, &header, 16, NEXT, length ? 1 : 2);
    describe(&queue, 1, data, length, NEXT | direction, 2);
    describe(&queue, 2, &status, 1, WRITE, 0);
}

static inline u8 request(u32 type, u64 sector, u32 length)
{
    chain(type, sector, length);
    offer(0, 0, &queue, 0);
    enum outcome outcome = await(0, &queue, LONG);
    if (outcome != USED)
        fail("outcome of a good request", outcome);
    return status;
}
