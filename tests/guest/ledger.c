/* Writes to the last 16 MiB of the disk in slot 0 for ever, and keeps in memory what it has written where: a disk that is not
   of the same moment as the memory is found out. Says "balanced" whenever it has looked at every page. */
#include "virtio.h"

/* Sectors. */
#define PART 32768
#define PAGES 1024ull
#define APART (PART / PAGES)

enum { IN = 0, OUT = 1 };

static struct queue queue;
static volatile struct {
    u32 type;
    u32 reserved;
    u64 sector;
} header;
static volatile u64 data[512] __attribute__((aligned(4096)));
static volatile u8 status;
/* What each page begins and ends with; 0 before it was written first. */
static u64 ledger[PAGES];
static u64 first;

static void fail(const char *what, u64 number)
{
    print("WRONG ");
    say(what, number);
    halt();
}

static void request(u32 type, u64 page)
{
    header.type = type;
    header.reserved = 0;
    header.sector = first + page * APART;
    status = 0xff;
    describe(&queue, 0, &header, 16, NEXT, 1);
    describe(&queue, 1, data, 4096, NEXT | (type == IN ? WRITE : 0), 2);
    describe(&queue, 2, &status, 1, WRITE, 0);
    offer(0, 0, &queue, 0);
    enum outcome outcome = await(0, &queue, LONG);
    if (outcome != USED)
        fail("outcome of a request", outcome);
    if (status)
        fail("status of a request", status);
}

void guest(const char *word)
{
    (void)word;
    if (!drive(0, EVERY, &queue))
        fail("the device does not begin: status", get(0, STATUS));
    first = get(0, CONFIG) - PART;
    u64 dice = 1;
    for (u64 round = 1;; round++) {
        dice = dice * 6364136223846793005ull + 1442695040888963407ull;
        u64 page = (dice >> 33) % PAGES;
        data[0] = data[511] = round;
        request(OUT, page);
        ledger[page] = round;
        page = round % PAGES;
        data[0] = data[511] = ~0ull;
        request(IN, page);
        if (data[0] != ledger[page] || data[511] != ledger[page])
            fail("the page that should have another number has", data[0]);
        if (!page)
            print("balanced\n");
    }
}
