/* What all guests share. They use general registers only, and short loops: there are hosts whose
   KVM interprets every instruction. */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

/* The monitor's address map (machine/src/layout.rs). */
#define VIRTIO 0xf0100000ull
#define IOAPIC 0xfec00000ull
#define LAPIC 0xfee00000ull
#define NOWHERE 0xd0000000ull
#define PML4 0x9000ull
#define TRAMPOLINE 0x30000ull
#define SERIAL 0x3f8
#define KEYBOARD 0x64
#define PVPANIC 0x505
#define POWER 0x600

/* Each guest defines it: called with the first word of the command line and what follows it. */
void guest(const char *word);

/* Runs on the other processors. */
void processor(u32 number);

static inline void out8(u16 port, u8 value)
{
    __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port) : "memory");
}
static inline void out16(u16 port, u16 value)
{
    __asm__ volatile("outw %0, %1" : : "a"(value), "Nd"(port) : "memory");
}
static inline void out32(u16 port, u32 value)
{
    __asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port) : "memory");
}
static inline u8 in8(u16 port)
{
    u8 value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port) : "memory");
    return value;
}
static inline u16 in16(u16 port)
{
    u16 value;
    __asm__ volatile("inw %1, %0" : "=a"(value) : "Nd"(port) : "memory");
    return value;
}
static inline u32 in32(u16 port)
{
    u32 value;
    __asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port) : "memory");
    return value;
}

/* One access of exactly this width, aligned or not. */
#define ACCESS(bits, suffix)                                                                       \
    static inline u##bits read##bits(u64 address)                                                  \
    {                                                                                              \
        u##bits value;                                                                             \
        __asm__ volatile("mov" suffix " (%1), %0" : "=r"(value) : "r"(address) : "memory");        \
        return value;                                                                              \
    }                                                                                              \
    static inline void write##bits(u64 address, u##bits value)                                     \
    {                                                                                              \
        __asm__ volatile("mov" suffix " %0, (%1)" : : "r"(value), "r"(address) : "memory");        \
    }
ACCESS(8, "b")
ACCESS(16, "w")
ACCESS(32, "l")
ACCESS(64, "q")
#undef ACCESS

static inline u64 ticks(void)
{
    u32 low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
    return (u64)high << 32 | low;
}
static inline void barrier(void)
{
    __asm__ volatile("mfence" : : : "memory");
}
static inline void relax(void)
{
    __asm__ volatile("pause" : : : "memory");
}
__attribute__((noreturn)) static inline void halt(void)
{
    for (;;)
        __asm__ volatile("cli; hlt");
}

static inline u64 read_msr(u32 index)
{
    u32 low, high;
    __asm__ volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(index));
    return (u64)high << 32 | low;
}
static inline void write_msr(u32 index, u64 value)
{
    __asm__ volatile("wrmsr" : : "a"((u32)value), "d"((u32)(value >> 32)), "c"(index) : "memory");
}

/* Has `handler`, an __attribute__((interrupt)) function, called for `vector`. */
struct frame;
void on_interrupt(u8 vector, void (*handler)(struct frame *));

/* The serial port. `say` prints a line: words and a number in hexadecimal. */
void print(const char *text);
void print_number(u64 number);
void say(const char *words, u64 number);
/* One byte of input; waits for it. */
char take(void);

/* Whether the command line's first word is this one. */
bool same(const char *word, const char *other);

/* Starts the other processors, up to `count` in all, and waits until they run. */
void start_others(u32 count);
