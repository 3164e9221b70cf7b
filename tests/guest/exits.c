/* Gives every part of a processor's state a distinct value, then repeats the one operation that the
   command line names. It checks what it reads. */
#include "virtio.h"

#define COUNTERS 0x400000ull
#define CLOCK 0x500000ull
#define WALL_CLOCK 0x501000ull
#define TICK 0x50

static void expect(const char *what, u64 got, u64 wanted)
{
    if (got == wanted)
        return;
    print("WRONG ");
    print(what);
    say(" is", got);
    halt();
}

static inline void count(u32 number)
{
    u64 at = COUNTERS + number * 4096;
    write64(at, read64(at) + 1);
}

void processor(u32 number)
{
    for (;;)
        count(number);
}

/* Values that differ from the initial ones. */
static const struct {
    u32 index;
    u64 value;
} msrs[] = {
    {0x174, 0x18},                                          /* SYSENTER */
    {0x175, 0x123400},
    {0x176, 0x567800},
    {0x200, 0xd0000000},                                    /* memory types */
    {0x201, 0xf0000800},
    {0x20e, 0xe0000001},
    {0x20f, 0xffff0800},
    {0x250, 0x0606060606060606},
    {0x259, 0x0000000000000606},
    {0x26f, 0x0505050505050505},
    {0x2ff, 0xc06},
    {0x277, 0x0007040600010406},                            /* PAT */
    {0x400, ~0ull},                                         /* machine check banks 0, 3 */
    {0x40c, ~0ull},
    {0x4b564d00, WALL_CLOCK},                               /* kvm-clock */
    {0x4b564d01, CLOCK | 1},
    {0xc0000081, 0x0013001000000000},                       /* SYSCALL */
    {0xc0000082, 0x234500},
    {0xc0000083, 0x345600},
    {0xc0000084, 0x47700},
    {0xc0000100, 0x11000},                                  /* FS, GS */
    {0xc0000101, 0x12000},
    {0xc0000102, 0x13000},
};

static void check(void)
{
    for (u32 at = 0; at < sizeof msrs / sizeof *msrs; at++) {
        u64 got = read_msr(msrs[at].index);
        if (got != msrs[at].value) {
            say("MSR", msrs[at].index);
            expect("an MSR", got, msrs[at].value);
        }
    }
    u64 got;
    __asm__ volatile("mov %%dr2, %0" : "=r"(got));
    expect("DR2", got, 0x123456);
    __asm__ volatile("mov %%cr2, %0" : "=r"(got));
    expect("CR2", got, 0xabcdef);
    expect("the task priority", read32(LAPIC + 0x80), 0x10);
    expect("the IOAPIC's pin 20", (write32(IOAPIC, 0x10 + 40), read32(IOAPIC + 0x10)), 0x18099);
    expect("the PIC's mask", in8(0x21), 0xa5);
}

static void furnish(void)
{
    for (u32 at = 0; at < sizeof msrs / sizeof *msrs; at++)
        write_msr(msrs[at].index, msrs[at].value);
    __asm__ volatile("mov %0, %%dr0" : : "r"(0x9000000ull));
    __asm__ volatile("mov %0, %%dr2" : : "r"(0x123456ull));
    __asm__ volatile("mov %0, %%dr7" : : "r"(0x401ull));
    __asm__ volatile("mov %0, %%cr2" : : "r"(0xabcdefull));
    /* PICs: vectors from 0x20 and 0x28, some masked. */
    static const u8 words[][2] = {{0x20, 0x11}, {0x21, 0x20}, {0x21, 4}, {0x21, 1}, {0x21, 0xa5},
                                  {0xa0, 0x11}, {0xa1, 0x28}, {0xa1, 2}, {0xa1, 1}, {0xa1, 0x5a}};
    for (u32 at = 0; at < sizeof words / sizeof *words; at++)
        out8(words[at][0], words[at][1]);
    /* PIT: channel 0 one-shot, with a count that is never reached; channel 2 a square wave. */
    out8(0x43, 0x30);
    out8(0x40, 0xff);
    out8(0x40, 0xff);
    out8(0x43, 0xb6);
    out8(0x42, 0x34);
    out8(0x42, 0x12);
    /* Pin 20: masked, level-triggered. */
    write32(IOAPIC, 0x10 + 40);
    write32(IOAPIC + 0x10, 0x18099);
    write32(LAPIC + 0xf0, 0x1ff);
    write32(LAPIC + 0x80, 0x10);
    write32(LAPIC + 0x350, 0x10700);
    write32(LAPIC + 0x370, 0x100fe);
}

/* Called repeatedly; runs for a while each time. */
__attribute__((interrupt)) static void tick(struct frame *frame)
{
    (void)frame;
    for (u32 n = 0; n < 1000; n++)
        count(1);
    write32(LAPIC + 0xb0, 0);
}

static void begin_ticks(void)
{
    on_interrupt(TICK, tick);
    write32(LAPIC + 0x3e0, 0xb);
    write32(LAPIC + 0x320, 0x20000 | TICK);
    write32(LAPIC + 0x380, 200000);
}

static void once(const char *word)
{
    u64 buffer[4] = {1, 2, 3, 4};
    u64 to = (u64)buffer, n = 4;
    if (same(word, "port-in")) {
        expect("the scratch register", in8(SERIAL + 7), 0x5a);
    } else if (same(word, "port-out")) {
        out8(SERIAL + 7, 0x5a);
    } else if (same(word, "string-in")) {
        __asm__ volatile("rep insw" : "+D"(to), "+c"(n) : "d"(0x300) : "memory");
        expect("four words of an empty port", buffer[0], ~0ull);
        expect("what is behind them", buffer[1], 2);
    } else if (same(word, "string-out")) {
        __asm__ volatile("rep outsl" : "+S"(to), "+c"(n) : "d"(0x300) : "memory");
        expect("a string's end", to, (u64)(buffer + 2));
    } else if (same(word, "register-read")) {
        expect("an empty address", read64(NOWHERE), ~0ull);
    } else if (same(word, "register-write")) {
        write32(VIRTIO + 0x30, 0xffff);
        expect("no queue's size", read32(VIRTIO + 0x34), 0);
    } else if (same(word, "across-pages-read")) {
        expect("two empty pages", read64(NOWHERE + 0xffc), ~0ull);
    } else if (same(word, "across-pages-write")) {
        write64(NOWHERE + 0xffb, 0x0123456789abcdef);
    } else if (same(word, "handler")) {
        __asm__ volatile("sti; nop; cli");
    } else if (same(word, "wait")) {
        __asm__ volatile("sti; hlt; cli");
    } else if (same(word, "sleep")) {
        __asm__ volatile("cli; hlt");
    } else {
        relax();
    }
}

void guest(const char *word)
{
    const char *second = word;
    while (*second != ' ')
        second++;
    furnish();
    if (same(second + 1, "others"))
        start_others(4);
    if (same(word, "handler") || same(word, "wait"))
        begin_ticks();
    out8(SERIAL + 7, 0x5a);
    check();
    print("ready\n");
    for (u64 n = 0;; n++) {
        once(word);
        count(0);
        if ((n & 0xff) == 0)
            check();
    }
}
