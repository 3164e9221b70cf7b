/* Writes to every page from 16 MiB up to the number of MiB in the first word, and drives the
   balloon: puts as many of these pages into it as the device requests, beginning with the first,
   and takes the last ones out again. Then prints "balloon" and the number of pages in it. Commands
   on the serial port: "c" checks every page (a page in the balloon has to be zero); "r" reports the
   upper half of all pages as free, which are zero from then on; "u" puts every second 64 KiB into
   the balloon; "s" provides a buffer with statistics. */
#include "virtio.h"

#define FROM (16ull << 20)
#define BATCH 256
#define UNIT 16
enum { BALLOON = 5, INFLATE = 0, DEFLATE = 1, STATS = 2, REPORTING = 4, QUEUES = 5 };
enum { TARGET = CONFIG, ACTUAL = CONFIG + 4 };

static struct queue queues[QUEUES];
static u32 numbers[BATCH];
static u32 slot, actual, pages, reported;
static bool scattered;
static struct {
    u16 tag;
    u64 value;
} __attribute__((packed)) stats[2];

static u64 page(u32 number)
{
    return FROM + number * 4096ull;
}

static void fail(const char *what, u64 number)
{
    print("WRONG ");
    say(what, number);
    halt();
}

static void send(u32 queue, const volatile void *address, u32 length, u16 flags)
{
    describe(&queues[queue], 0, address, length, flags, 0);
    offer(slot, queue, &queues[queue], 0);
    if (await(slot, &queues[queue], LONG) != USED)
        fail("no answer from queue", queue);
}

/* Moves the pages from `first` on into or out of the balloon. */
static void move(u32 queue, u32 first, u32 count)
{
    /* From high to low, as Linux has them. */
    for (u32 i = 0; i < count; i++)
        numbers[i] = (u32)(page(first + count - 1 - i) / 4096);
    send(queue, numbers, 4 * count, 0);
}

static u32 least(u32 a, u32 b)
{
    return a < b ? a : b;
}

static void follow(void)
{
    u32 target = least(get(slot, TARGET), pages);
    if (target == actual)
        return;
    while (actual < target) {
        u32 count = least(target - actual, BATCH);
        move(INFLATE, actual, count);
        actual += count;
    }
    while (actual > target) {
        u32 count = least(actual - target, BATCH);
        actual -= count;
        move(DEFLATE, actual, count);
        for (u32 i = 0; i < count; i++)
            write64(page(actual + i), page(actual + i));
    }
    set(slot, ACTUAL, actual);
    say("balloon", actual);
}

static void check(void)
{
    for (u32 number = 0; number < pages; number++) {
        bool gone = number < actual || number >= reported || (scattered && number / UNIT % 2);
        u64 expected = gone ? 0 : page(number);
        u64 found = read64(page(number));
        if (found != expected) {
            say("expected", expected);
            say("found", found);
            fail("contents of page", number);
        }
    }
    print("checked\n");
}

void guest(const char *word)
{
    u64 end = 0;
    while (*word >= '0' && *word <= '9')
        end = end * 10 + (u64)(*word++ - '0');
    pages = (u32)(((end << 20) - FROM) / 4096);
    reported = pages;
    for (u32 number = 0; number < pages; number++)
        write64(page(number), page(number));
    while (get(slot, DEVICE_ID) != BALLOON)
        slot++;
    if (!negotiate(slot, EVERY))
        fail("no features", 0);
    for (u32 queue = 0; queue < QUEUES; queue++)
        place(slot, queue, &queues[queue]);
    set(slot, STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    print("filled\n");
    for (;;) {
        follow();
        relax();
        if (!(in8(SERIAL + 5) & 1))
            continue;
        switch (in8(SERIAL)) {
        case 'c':
            check();
            break;
        case 'r':
            reported = pages / 2;
            send(REPORTING, (void *)page(reported), (pages - reported) * 4096, WRITE);
            print("reported\n");
            break;
        case 'u':
            scattered = true;
            for (u32 first = UNIT; first + UNIT <= pages; first += 2 * UNIT)
                move(INFLATE, first, UNIT);
            print("scattered\n");
            break;
        case 's':
            stats[0].tag = 4;
            stats[0].value = 5 << 20;
            stats[1].tag = 5;
            stats[1].value = end << 20;
            describe(&queues[STATS], 0, stats, sizeof stats, 0, 0);
            submit(slot, STATS, &queues[STATS], 0);
            print("lent\n");
            break;
        }
    }
}
