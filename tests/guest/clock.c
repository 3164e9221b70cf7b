/* Prints the time of its kvm-clock, in nanoseconds, for each byte that it receives. */
#include "guest.h"

/* struct pvclock_vcpu_time_info of arch/x86/include/asm/pvclock-abi.h. */
#define CLOCK 0x500000ull

static u64 nanoseconds(void)
{
    for (;;) {
        u32 version = read32(CLOCK);
        barrier();
        u64 delta = ticks() - read64(CLOCK + 8);
        int8_t shift = (int8_t)read8(CLOCK + 28);
        delta = shift < 0 ? delta >> -shift : delta << shift;
        u64 now = read64(CLOCK + 16) + (u64)((unsigned __int128)delta * read32(CLOCK + 24) >> 32);
        barrier();
        if (!(version & 1) && version == read32(CLOCK))
            return now;
    }
}

void guest(const char *word)
{
    (void)word;
    write_msr(0x4b564d01, CLOCK | 1);
    for (;;) {
        say("clock", nanoseconds());
        take();
    }
}
