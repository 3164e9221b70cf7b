/* Drives the disk in slot 0: "works" correctly, "hostile" and "race" incorrectly, "busy" and
   "resets" endlessly, the latter with a request in flight at each reset of the device. The disk has
   2048 sectors; each begins with its own number. */
#include "disk.h"

#define SECTORS 2048
#define ROUNDS 0x400000ull

static void must(u8 got, u8 wanted, const char *what)
{
    if (got != wanted)
        fail(what, got);
}

static void begin(void)
{
    if (!drive(0, EVERY, &queue))
        fail("the device does not begin: status", get(0, STATUS));
}

/* Every operation of a disk. `mark` distinguishes one pass from another. */
static void works(u64 mark)
{
    begin();
    must(request(IN, 5, 512), OK, "status of a read");
    if (data[0] != 5)
        fail("sector 5 begins with", data[0]);
    for (u32 i = 0; i < 64; i++)
        data[i] = mark + i;
    must(request(OUT, 7, 512), OK, "status of a write");
    must(request(FLUSH, 0, 0), OK, "status of a flush");
    for (u32 i = 0; i < 64; i++)
        data[i] = 0;
    must(request(IN, 7, 512), OK, "status of the second read");
    for (u32 i = 0; i < 64; i++)
        if (data[i] != mark + i)
            fail("sector 7 has", data[i]);
    must(request(IN, SECTORS - 8, 4096), OK, "status of a read of the last page");
    if (data[7 * 64] != SECTORS - 1)
        fail("the last sector begins with", data[7 * 64]);
    must(request(GET_ID, 0, 20), OK, "status of GET_ID");
    ((volatile u8 *)data)[20] = 0;
    print("the serial number is ");
    print((const char *)data);
    print("\n");
}

static void interrupts(void)
{
    for (u8 time = 0; time < 8; time++) {
        u8 vector = (u8)(0x40 + time);
        route(5, vector);
        must(request(IN, time, 512), OK, "status of a read");
        u64 begin = ticks();
        while (!pending(vector))
            if (ticks() - begin > LONG)
                fail("no interrupt for request", time);
        if (!(get(0, INTERRUPT_STATUS) & 1))
            fail("the interrupt's status is", get(0, INTERRUPT_STATUS));
        set(0, INTERRUPT_ACK, 1);
    }
    print("every request interrupted\n");
}

/* A queue's worth of requests at once, many times, past the wrap of the rings. */
static void batches(void)
{
    static volatile u8 all[5];
    for (u32 time = 0; time < 40; time++) {
        prepare(IN, 5);
        for (u16 i = 0; i < 5; i++) {
            all[i] = NOTHING;
            describe(&queue, i * 3, &header, 16, NEXT, i * 3 + 1);
            describe(&queue, i * 3 + 1, data + 64 * i, 512, NEXT | WRITE, i * 3 + 2);
            describe(&queue, i * 3 + 2, &all[i], 1, WRITE, 0);
            queue.available.ring[(u16)(queue.available.index + i) % SIZE] = i * 3;
        }
        barrier();
        queue.available.index += 5;
        barrier();
        set(0, QUEUE_NOTIFY, 0);
        for (u32 i = 0; i < 5; i++)
            if (await(0, &queue, LONG) != USED)
                fail("a batch stops after", i);
        for (u32 i = 0; i < 5; i++)
            if (all[i] != OK || data[64 * i] != 5)
                fail("a request of a batch has status", all[i]);
    }
    print("batches are done\n");
}

/* After each malformed chain the device has reported an error, or that it needs a reset. */
static void answered(const char *what)
{
    print(what);
    enum outcome outcome = await(0, &queue, LONG);
    if (outcome == SILENT)
        fail("no answer to that; status", get(0, STATUS));
    if (outcome == USED && status == OK)
        fail("that was taken for good", 0);
    print(outcome == USED ? ": an error\n" : ": needs a reset\n");
}

/* A write that must not reach the disk, with one thing wrong. */
#define WRONG(what, ...)                                                                           \
    begin();                                                                                       \
    chain(OUT, 100, 512);                                                                          \
    __VA_ARGS__;                                                                                   \
    offer(0, 0, &queue, 0);                                                                        \
    answered(what)

static void chains(void)
{
    static volatile struct descriptor table[4] __attribute__((aligned(16)));
    WRONG("a descriptor that follows itself", queue.table[1].next = 1);
    WRONG("two that follow each other", queue.table[2].flags = WRITE | NEXT;
          queue.table[2].next = 1);
    WRONG("a next one outside the table", queue.table[1].next = SIZE);
    WRONG("a next one far outside", queue.table[1].next = 0xffff);
    WRONG("data beyond RAM", queue.table[1].address = 1ull << 40);
    WRONG("data that wraps", queue.table[1].address = ~0ull - 100);
    WRONG("data that straddles the end of RAM", queue.table[1].address = (32 << 20) - 256);
    WRONG("data in registers", queue.table[1].address = VIRTIO);
    WRONG("data of 4 GiB", queue.table[1].length = 0xffffffff);
    WRONG("data of no length", queue.table[1].length = 0);
    WRONG("data of a byte more", queue.table[1].length = 513);
    WRONG("a header of 15 bytes", queue.table[0].length = 15; queue.table[1].length = 512);
    WRONG("a header beyond RAM", queue.table[0].address = 1ull << 63);
    WRONG("a header to be written", queue.table[0].flags |= WRITE);
    WRONG("a status not to be written", queue.table[2].flags = 0);
    WRONG("a status beyond RAM", queue.table[2].address = 1ull << 40);
    WRONG("a header alone", queue.table[0].flags = 0);
    WRONG("a sector after the last", header.sector = SECTORS);
    WRONG("a sector that wraps", header.sector = ~0ull);
    WRONG("a sector whose byte wraps", header.sector = 1ull << 55);
    WRONG("an unknown type", header.type = 77);
    WRONG("a SCSI command", header.type = 2);
    if (!drive(0, EVERY & ~F_INDIRECT, &queue))
        fail("the device does not begin: status", get(0, STATUS));
    chain(OUT, 100, 512);
    queue.table[0].flags = INDIRECT;
    queue.table[0].address = (u64)table;
    offer(0, 0, &queue, 0);
    answered("an indirect table not agreed on");

    /* With indirect descriptors negotiated. */
    struct {
        const char *what;
        u32 length;
        u16 outer, inner, next;
    } cases[] = {
        {"an indirect table of no length", 0, INDIRECT, NEXT, 1},
        {"an indirect table cut in two", 40, INDIRECT, NEXT, 1},
        {"an indirect table that loops", 48, INDIRECT, NEXT, 0},
        {"an indirect table that leaves itself", 48, INDIRECT, NEXT, 3},
        {"an indirect table in an indirect table", 48, INDIRECT, NEXT | INDIRECT, 1},
        {"an indirect table with something after it", 48, INDIRECT | NEXT, NEXT, 1},
        {"an indirect table of 4 GiB", 0xfffffff0, INDIRECT, NEXT, 1},
    };
    for (u32 i = 0; i < sizeof cases / sizeof *cases; i++) {
        if (!drive(0, EVERY, &queue))
            fail("no indirect descriptors: status", get(0, STATUS));
        chain(OUT, 100, 512);
        for (u32 n = 0; n < 3; n++) {
            table[n].address = queue.table[n].address;
            table[n].length = queue.table[n].length;
            table[n].flags = queue.table[n].flags;
            table[n].next = queue.table[n].next;
        }
        table[0].flags = cases[i].inner;
        table[0].next = cases[i].next;
        describe(&queue, 0, table, cases[i].length, cases[i].outer, 1);
        offer(0, 0, &queue, 0);
        answered(cases[i].what);
    }
}

static void rings(void)
{
    begin();
    queue.available.ring[0] = SIZE;
    queue.available.index = 1;
    set(0, QUEUE_NOTIFY, 0);
    status = NOTHING;
    answered("a head outside the table");

    u16 jumps[] = {SIZE + 1, 0x8000, 0xffff};
    for (u32 i = 0; i < 3; i++) {
        begin();
        status = NOTHING;
        queue.available.index = jumps[i];
        barrier();
        set(0, QUEUE_NOTIFY, 0);
        answered("an index that jumps");
    }

    /* A smaller index again means that all but one of 2^16 chains are new. */
    begin();
    must(request(IN, 1, 512), OK, "status of a read");
    status = NOTHING;
    queue.available.index = 0;
    set(0, QUEUE_NOTIFY, 0);
    answered("an index that goes back");

    /* The same chain twice: both requests complete, without an error. */
    begin();
    chain(IN, 1, 512);
    queue.available.ring[0] = queue.available.ring[1] = 0;
    queue.available.index = 2;
    barrier();
    set(0, QUEUE_NOTIFY, 0);
    if (await(0, &queue, LONG) == SILENT || await(0, &queue, LONG) == SILENT)
        fail("a chain offered twice is not answered", 0);

    /* The device writes over its own rings, which harms only the guest. */
    begin();
    chain(IN, 5, 4096);
    queue.table[1].address = (u64)&queue & ~4095ull;
    offer(0, 0, &queue, 0);
    await(0, &queue, BRIEF);
    begin();
    chain(IN, 5, 512);
    queue.table[1].address = (u64)&queue.used & ~511ull;
    offer(0, 0, &queue, 0);
    await(0, &queue, BRIEF);
    print("rings written over\n");

    /* Event indices that are never reached. */
    if (!drive(0, EVERY, &queue))
        fail("no event index: status", get(0, STATUS));
    for (u32 i = 0; i < 40; i++) {
        chain(IN, 1, 512);
        queue.available.used_event = (u16)(i * 0x1234);
        submit(0, 0, &queue, 0);
        if (await(0, &queue, LONG) != USED)
            fail("no answer with the event index", queue.available.used_event);
        must(status, OK, "status of a read with a hostile event index");
    }
    print("hostile event indexes\n");
}

static u32 seed = 1;
static u32 chance(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 17;
    return seed ^= seed << 5;
}

static void registers(void)
{
    /* After DRIVER_OK the queue's registers are closed: the device keeps its values. */
    begin();
    for (u32 select = 0; select < 3; select++) {
        set(0, QUEUE_SEL, select == 2 ? 0xffff : select);
        u32 offsets[] = {QUEUE_SIZE,     QUEUE_DESC,       QUEUE_DESC + 4,   QUEUE_DRIVER,
                         QUEUE_DRIVER + 4, QUEUE_DEVICE,     QUEUE_DEVICE + 4, QUEUE_READY,
                         DRIVER_FEATURES};
        u32 values[] = {0, 1, 3, 0x8000, 0xffffffff};
        for (u32 i = 0; i < 9; i++)
            for (u32 v = 0; v < 5; v++)
                if (offsets[i] != QUEUE_READY || values[v] & 1)
                    set(0, offsets[i], values[v]);
    }
    must(request(IN, 5, 512), OK, "status of a read after a rewrite of the registers");
    if (data[0] != 5)
        fail("sector 5 begins with", data[0]);
    print("registers rewritten\n");

    /* Except that a queue can be disabled: the device stops using it, and needs a reset. */
    set(0, QUEUE_SEL, 0);
    set(0, QUEUE_READY, 0);
    if (get(0, QUEUE_READY) || !(get(0, STATUS) & NEEDS_RESET))
        fail("a queue that was taken back is ready: status", get(0, STATUS));

    /* Invalid ring addresses and sizes: refused when the driver sets DRIVER_OK. */
    u64 places[] = {0, 1, VIRTIO, 32 << 20, 1ull << 40, ~15ull};
    for (u32 i = 0; i < 6; i++)
        for (u32 ring = QUEUE_DESC; ring <= QUEUE_DEVICE; ring += 16) {
            negotiate(0, EVERY);
            place(0, 0, &queue);
            set(0, QUEUE_READY, 0);
            set(0, ring, (u32)places[i]);
            set(0, ring + 4, (u32)(places[i] >> 32));
            set(0, QUEUE_READY, 1);
            set(0, STATUS, 15);
            if (!(get(0, STATUS) & NEEDS_RESET))
                fail("a ring is taken at", places[i]);
        }
    u32 sizes[] = {0, 3, 0x8000, 0x10000, 0xffffffff};
    for (u32 i = 0; i < 5; i++) {
        negotiate(0, EVERY);
        place(0, 0, &queue);
        set(0, QUEUE_READY, 0);
        set(0, QUEUE_SIZE, sizes[i]);
        set(0, QUEUE_READY, 1);
        set(0, STATUS, 15);
        if (!(get(0, STATUS) & NEEDS_RESET))
            fail("a queue is taken of size", sizes[i]);
    }
    if (negotiate(0, 0))
        fail("a driver without VERSION_1 is taken", 0);
    print("impossible queues\n");

    /* Random registers, values and widths, the status most often. */
    for (u32 i = 0; i < 3000; i++) {
        u32 offset = chance() % 3 == 0 ? STATUS : chance() % 0x120;
        u32 value = chance() >> chance() % 32;
        switch (chance() % 8) {
        case 0:
            write8(at(0, offset), (u8)value);
            break;
        case 1:
            write16(at(0, offset), (u16)value);
            break;
        case 2:
            write64(at(0, offset), value);
            break;
        default:
            set(0, offset & ~3u, value);
        }
    }
    print("a walk by chance\n");
}

static void floods(void)
{
    begin();
    for (u32 i = 0; i < 5000; i++)
        set(0, QUEUE_NOTIFY, i % 3 == 0 ? 0 : i % 3 == 1 ? 1 : 0xffff);
    must(request(IN, 5, 512), OK, "status of a read after a flood of notifications");
    print("a flood of notifications\n");

    /* Reset with requests in flight: afterwards none of their data arrives. */
    for (u32 i = 0; i < 200; i++) {
        begin();
        chain(IN, i, 4096);
        offer(0, 0, &queue, 0);
        set(0, STATUS, 0);
        data[0] = 0x1122334455667788;
        status = 0x77;
        if (i % 20 == 0)
            for (u32 wait = 0; wait < 200; wait++)
                relax();
        if (data[0] != 0x1122334455667788 || status != 0x77)
            fail("something arrived after the reset, time", i);
    }
    print("resets in flight\n");
}

/* Another processor changes rings and descriptors while the device reads them. Whatever the device
   then does, it can write only to unused memory: 1 MiB from each of these addresses on. */
#define SPARE_HEADER 0x800000ull
#define SPARE_DATA 0xa00000ull
#define SPARE_STATUS 0xc00000ull

static void spare_chain(void)
{
    describe(&queue, 0, (void *)SPARE_HEADER, 16, NEXT, 1);
    describe(&queue, 1, (void *)SPARE_DATA, 512, NEXT | WRITE, 2);
    describe(&queue, 2, (void *)SPARE_STATUS, 1, WRITE, 0);
}

void processor(u32 number)
{
    u32 random = 77 + number;
    for (;;) {
        random ^= random << 13;
        random ^= random >> 17;
        random ^= random << 5;
        volatile struct descriptor *one = &queue.table[random % 4];
        switch (random >> 8 & 7) {
        case 0:
            one->length = random >> 12;
            break;
        case 1:
            one->address = (u64)(random | 1u << 31) << (random >> 11 & 31);
            break;
        case 2:
            one->next = (u16)(random >> 16);
            break;
        case 3:
            one->flags = random >> 12 & 7;
            break;
        case 4:
            queue.available.ring[random >> 12 & 15] = random >> 16 & 31;
            break;
        case 5: /* Rarely: afterwards only a reset helps. */
            if ((random >> 12 & 127) == 0)
                queue.available.index = (u16)(random >> 16);
            break;
        default: /* Valid again, for a moment. */
            spare_chain();
        }
    }
}

static void race(void)
{
    u32 outcomes[3] = {0, 0, 0};
    start_others(2);
    for (u32 i = 0; i < 300; i++) {
        if (i % 4 == 0 || get(0, STATUS) & NEEDS_RESET)
            drive(0, EVERY, &queue);
        spare_chain();
        offer(0, 0, &queue, 0);
        outcomes[await(0, &queue, BRIEF)]++;
    }
    set(0, STATUS, 0);
    say("used", outcomes[USED]);
    say("needed a reset", outcomes[GAVE_UP]);
}

void guest(const char *word)
{
    say("capacity", get(0, CONFIG));
    if (same(word, "read-only")) {
        begin();
        if (!(offered(0) >> 5 & 1))
            fail("a read-only disk does not say so: features", offered(0));
        must(request(IN, 5, 512), OK, "status of a read");
        must(request(OUT, 5, 512), IOERR, "status of a write");
        must(request(FLUSH, 0, 0), OK, "status of a flush");
    }
    if (same(word, "works")) {
        works(0xfeed000000000000);
        interrupts();
        batches();
    }
    if (same(word, "hostile")) {
        chains();
        rings();
        registers();
        floods();
        works(0xface000000000000);
    }
    if (same(word, "race"))
        race();
    for (u64 round = 0; same(word, "busy"); round++) {
        /* With flushes negotiated, a write need not wait for the medium. */
        if (round % 50 == 0 && !drive(0, EVERY, &queue))
            fail("the device does not begin: status", get(0, STATUS));
        for (u32 i = 0; i < 64; i++)
            data[i] = round;
        must(request(OUT, 9, 512), OK, "status of a write");
        data[0] = ~round;
        must(request(IN, 9, 512), OK, "status of a read");
        if (data[0] != round)
            fail("the sector has", data[0]);
        write64(ROUNDS, round + 1);
    }
    for (u64 round = 0; same(word, "resets"); round++) {
        begin();
        chain(OUT, 9, 512);
        offer(0, 0, &queue, 0);
        /* Otherwise, on a busy host, the device would never have taken the request before the
           reset. */
        for (u64 since = ticks(); ticks() - since < round % 8 * 2000000;)
            relax();
        set(0, STATUS, 0);
        write64(ROUNDS, round + 1);
    }
    print("done\n");
}
