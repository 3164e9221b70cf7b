/* What all guests share: see guest.h. */
#include "guest.h"

/* The compiler may generate calls of these. */
void *memset(void *to, int byte, size_t count)
{
    for (volatile u8 *at = to; count--;)
        *at++ = (u8)byte;
    return to;
}
void *memcpy(void *restrict to, const void *restrict from, size_t count)
{
    volatile u8 *at = to;
    for (const u8 *next = from; count--;)
        *at++ = *next++;
    return to;
}

void print(const char *text)
{
    while (*text)
        out8(SERIAL, (u8)*text++);
}

void print_number(u64 number)
{
    char digits[17];
    char *at = digits + 16;
    *at = 0;
    do
        *--at = "0123456789abcdef"[number & 15];
    while (number >>= 4);
    print(at);
}

void say(const char *words, u64 number)
{
    print(words);
    print(" ");
    print_number(number);
    print("\n");
}

static struct {
    u64 low, high;
} gates[256] __attribute__((aligned(16)));

void on_interrupt(u8 vector, void (*handler)(struct frame *))
{
    struct {
        u16 limit;
        u64 base;
    } __attribute__((packed)) table = {sizeof gates - 1, (u64)gates};
    u64 at = (u64)handler;
    /* Present interrupt gate to the code segment, 0x10 (Intel SDM volume 3, 6.14.1). */
    gates[vector].low = (at & 0xffff) | 0x10 << 16 | 0x8e00ull << 32 | (at >> 16 & 0xffff) << 48;
    gates[vector].high = at >> 32;
    __asm__ volatile("lidt %0" : : "m"(table));
}

char take(void)
{
    while (!(in8(SERIAL + 5) & 1))
        relax();
    return (char)in8(SERIAL);
}

bool same(const char *word, const char *other)
{
    for (; *other; word++, other++)
        if (*word != *other)
            return false;
    return *word == 0 || *word == ' ';
}

extern u8 trampoline[], trampoline_end[];
extern volatile u32 others_started;

void start_others(u32 count)
{
    memcpy((void *)TRAMPOLINE, trampoline, (size_t)(trampoline_end - trampoline));
    write32(LAPIC + 0xf0, 0x1ff);
    /* INIT, then STARTUP with the trampoline's page (Intel SDM volume 3, 11.6.1), to all others. */
    write32(LAPIC + 0x300, 0x000c4500);
    write32(LAPIC + 0x300, (u32)(0x000c4600 | TRAMPOLINE >> 12));
    while (others_started < count - 1)
        relax();
}

__attribute__((weak)) void processor(u32 number)
{
    (void)number;
}

void start(u64 zero_page);
void start(u64 zero_page)
{
    /* cmd_line_ptr of the boot protocol. */
    guest((const char *)(u64)read32(zero_page + 0x228));
    halt();
}
