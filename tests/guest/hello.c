/* Prints that it runs, and ends in the way that the command line names. */
#include "guest.h"

/* Powers off by the power button, reboots by the keyboard, and echoes what is typed at the serial
   port. */
static void obey(void)
{
    print("waits\n");
    for (;;) {
        if (in8(POWER + 3) & 1) {
            print("button\n");
            out8(POWER, 5 << 2 | 1 << 5);
        }
        if (in8(KEYBOARD) & 1) {
            print("keys\n");
            out8(KEYBOARD, 0xfe);
        }
        if (in8(SERIAL + 5) & 1)
            out8(SERIAL, in8(SERIAL));
    }
}

/* Counts aloud, a hundred times a second or so. */
static void tally(void)
{
    for (u64 number = 1;; number++) {
        say("tally", number);
        u64 until = ticks() + (20u << 20);
        while (ticks() < until)
            relax();
    }
}

void guest(const char *word)
{
    print("hello\n");
    if (same(word, "tally"))
        tally();
    if (same(word, "obey"))
        obey();
    if (same(word, "poweroff"))
        out8(POWER, 5 << 2 | 1 << 5);
    if (same(word, "acpi-reset"))
        out8(POWER + 2, 1);
    if (same(word, "keyboard-reset"))
        out8(KEYBOARD, 0xfe);
    if (same(word, "panic"))
        out8(PVPANIC, 1);
    if (same(word, "triple-fault")) {
        struct {
            u16 limit;
            u64 base;
        } __attribute__((packed)) none = {0, 0};
        __asm__ volatile("lidt %0; ud2" : : "m"(none));
    }
    if (same(word, "nowhere"))
        ((void (*)(void))NOWHERE)();
    /* Text written by a string instruction. */
    if (same(word, "string")) {
        const char *text = "all at once\n";
        u64 count = 12;
        __asm__ volatile("rep outsb" : "+S"(text), "+c"(count) : "d"(SERIAL) : "memory");
    }
    /* Memory above 4 GiB, at an offset that nothing else uses. */
    if (same(word, "high")) {
        static u64 directory[512] __attribute__((aligned(4096)));
        u64 tables = read64(PML4) & ~0xfffull;
        directory[5] = (4ull << 30) + (5 << 21) + 0x83;
        write64(tables + 4 * 8, (u64)directory + 3);
        u64 at = (4ull << 30) + (5 << 21) + 0x1238;
        write64(at, 0x600df00d12345678);
        say("high memory holds", read64(at));
    }
    print("halts\n");
}
