/* Writes to the last 16 MiB of the disk in slot 0 endlessly, and records in memory what it has
   written where: so it detects a disk that is not from the same moment as the memory. Prints
   "balanced" whenever it has checked every page. */
#include "disk.h"

/* Sectors. */
#define PART 32768
#define PAGES 1024ull
#define APART (PART / PAGES)

/* What each page begins and ends with; 0 before the first write to it. */
static u64 ledger[PAGES];
static u64 first;

static void move(u32 type, u64 page)
{
    u8 status = request(type, first + page * APART, 4096);
    if (status)
        fail("status of a request", status);
}

void guest(const char *word)
{
    (void)word;
    if (!drive(0, EVERY, &queue))
        fail("the device does not begin: status", get(0, STATUS));
    first = get(0, CONFIG) - PART;
    u64 random = 1;
    for (u64 round = 1;; round++) {
        random = random * 6364136223846793005ull + 1442695040888963407ull;
        u64 page = (random >> 33) % PAGES;
        data[0] = data[511] = round;
        move(OUT, page);
        ledger[page] = round;
        page = round % PAGES;
        data[0] = data[511] = ~0ull;
        move(IN, page);
        if (data[0] != ledger[page] || data[511] != ledger[page])
            fail("the page that should have another number has", data[0]);
        if (!page)
            print("balanced\n");
    }
}
