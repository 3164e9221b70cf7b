/* Every processor counts; the test reads the counters in memory from outside: see `counter`. The
   first word of the command line says what else it does: "registers" floods the monitor with port
   and register accesses and checks their results; "plain" does nothing else; "rings" goes through
   pages of memory and checks what it wrote there before, "far" above 4 GiB, too; "scattered" does
   so with 448 pages that are 512 KiB apart, and "strewn" with 2,000, all of them every 100 ms;
   "wide" first writes to every second MiB of 2 GiB. The second word is the number of processors. */
#include "guest.h"

/* One page for each processor, from 4 MiB on. */
#define COUNTERS 0x400000ull

/* The pages that each processor goes through, 1 MiB for each; and the same above 4 GiB. */
#define RINGS 0x600000ull
#define FAR 0x100000000ull
/* A page directory for the memory there. */
#define FAR_TABLE 0x500000ull
#define PAGES 256

/* From one scattered page to the next. */
#define APART 0x80000ull

static volatile bool flooding, going_round, going_far;
static volatile u64 scattered, period;

static inline u64 counter(u32 number)
{
    return COUNTERS + number * 4096;
}

static void expect(const char *what, u64 got, u64 wanted)
{
    if (got == wanted)
        return;
    print("WRONG ");
    print(what);
    say(" is", got);
    halt();
}

/* Each processor has a virtio slot and a serial port's scratch register or an empty port to itself:
   what it reads is what it wrote. */
static void flood(u32 number, u64 round)
{
    u64 slot = VIRTIO + number * 4096;
    switch (round & 7) {
    case 0: /* QueueSel, which selects a queue whose largest size shows. */
        write32(slot + 0x30, 0);
        expect("queue 0's size", read32(slot + 0x34) != 0, true);
        break;
    case 1:
        write32(slot + 0x30, 0xffff);
        expect("no queue's size", read32(slot + 0x34), 0);
        break;
    case 2: /* DeviceFeaturesSel: VERSION_1 is in the upper half. */
        write32(slot + 0x14, 1);
        expect("VERSION_1", read32(slot + 0x10) & 1, 1);
        break;
    case 3:
        expect("unclaimed memory", read64(NOWHERE + number * 4096), ~0ull);
        break;
    case 4: /* An access of two exits: the pages belong to no device. */
        expect("two unclaimed pages", read64(NOWHERE + number * 4096 + 0xffc), ~0ull);
        break;
    case 5:
        if (number == 0) {
            out8(SERIAL + 7, (u8)(round >> 3));
            expect("the scratch register", in8(SERIAL + 7), (u8)(round >> 3));
        } else {
            expect("an unclaimed port", in32(0x300), ~0u);
        }
        break;
    case 6: /* Ignored: the magic value, and an access of two exits that ends in it. */
        write32(slot, (u32)round);
        write64(VIRTIO - 4, round << 32 | round);
        expect("the magic value", read32(slot), 0x74726976);
        break;
    case 7: { /* Several accesses at once, into memory. */
        volatile u64 words = 0;
        u64 to = (u64)&words;
        u64 count = 4;
        __asm__ volatile("rep insw" : "+D"(to), "+c"(count) : "d"(0x300) : "memory");
        expect("four words of an unclaimed port", words, ~0ull);
        break;
    }
    }
}

/* Checks that the next page holds the number of the round in which it was written. */
static void go_round(u64 ring, u32 number, u64 round)
{
    u64 page = ring + number * 0x100000ull + round % PAGES * 4096;
    expect("a page of a ring", read64(page), round < PAGES ? 0 : round - PAGES);
    write64(page, round);
}

/* Each page holds the number of the round. */
static void scatter(u64 round)
{
    u64 begin = ticks();
    for (u64 page = 0; page < scattered; page++) {
        u64 at = RINGS + page * APART;
        expect("a scattered page", read64(at), round);
        write64(at, round + 1);
    }
    while (ticks() - begin < period)
        relax();
}

static void map_far(void)
{
    u64 tables = read64(PML4) & ~0xfffull;
    for (u64 entry = 0; entry < 512; entry++)
        write64(FAR_TABLE + entry * 8, (FAR + entry * 0x200000) | 0x83);
    write64(tables + 4 * 8, FAR_TABLE | 3);
}

void processor(u32 number)
{
    for (u64 round = 0;; round++) {
        write64(counter(number), round);
        if (going_round)
            go_round(RINGS, number, round);
        if (going_far)
            go_round(FAR, number, round);
        if (scattered && number == 0)
            scatter(round);
        if (flooding)
            flood(number, round);
    }
}

void guest(const char *word)
{
    flooding = same(word, "registers");
    going_far = same(word, "far");
    going_round = going_far || same(word, "rings");
    if (going_far)
        map_far();
    scattered = same(word, "scattered") ? 448 : same(word, "strewn") ? 2000 : 0;
    /* 100 ms of a TSC of 2 to 3 GHz. */
    period = scattered == 2000 ? 250000000 : 0;
    if (same(word, "wide"))
        for (u64 page = 0x1000000; page < 0x80000000; page += 0x200000)
            write64(page, page);
    while (*word != ' ')
        word++;
    u32 count = (u32)(word[1] - '0');
    start_others(count);
    say("processors", count);
    processor(0);
}
