/* Writes to every page from 16 MiB up to the number of MiB in the first word, then counts there. */
#include "guest.h"

#define FROM (16ull << 20)

void guest(const char *word)
{
    u64 end = 0;
    while (*word >= '0' && *word <= '9')
        end = end * 10 + (u64)(*word++ - '0');
    end <<= 20;
    for (u64 page = FROM; page < end; page += 4096)
        write64(page, page);
    print("filled\n");
    for (u64 round = 1;; round++)
        write64(FROM, round);
}
