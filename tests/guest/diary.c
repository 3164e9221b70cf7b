/* Counts on the disk in slot 0: continues from the number that it finds there, and says each one
   once it is durable. */
#include "disk.h"

static void must(u32 type, u32 length)
{
    u8 got = request(type, 0, length);
    if (got)
        fail("status of a request", got);
}

void guest(const char *word)
{
    (void)word;
    if (!drive(0, EVERY, &queue))
        fail("the device does not begin: status", get(0, STATUS));
    must(IN, 512);
    say("found", data[0]);
    for (;;) {
        data[0]++;
        must(OUT, 512);
        must(FLUSH, 0);
        say("tally", data[0]);
        u64 until = ticks() + (20u << 20);
        while (ticks() < until)
            relax();
    }
}
