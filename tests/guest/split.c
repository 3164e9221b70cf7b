/* Accesses of every width at the edges of register regions, repeatedly. Bytes outside read as all
   ones, bytes inside as the page has them, however an access is split. */
#include "guest.h"

#define SLOTS 6
#define END (VIRTIO + SLOTS * 4096)
/* Counter of the rounds, for the test to read. */
#define ROUNDS 0x400000ull

static u8 shown(u64 address)
{
    if (address < VIRTIO || address >= END)
        return 0xff;
    return (u8)(read32(address & ~3ull) >> 8 * (address & 3));
}

static void expect(u64 address, u32 width, u64 got, u64 wanted)
{
    if (got == wanted)
        return;
    print("WRONG ");
    print_number(width);
    say(" bytes at", address);
    say("read", got);
    say("not", wanted);
    halt();
}

static u64 get(u64 address, u32 width)
{
    switch (width) {
    case 1:
        return read8(address);
    case 2:
        return read16(address);
    case 4:
        return read32(address);
    default:
        return read64(address);
    }
}

static void put(u64 address, u32 width, u64 value)
{
    switch (width) {
    case 1:
        return write8(address, (u8)value);
    case 2:
        return write16(address, (u16)value);
    case 4:
        return write32(address, (u32)value);
    default:
        return write64(address, value);
    }
}

/* Before, between and after the register pages; the first device's configuration; pages of no
   device. */
static const u64 edges[] = {VIRTIO, VIRTIO + 4096, END, VIRTIO + 0x100, NOWHERE + 4096};

/* The bytes from 8 before each edge on. */
static u64 around[5][3];

static u64 cut(const u64 *bytes, u32 from, u32 width)
{
    u64 value = 0;
    for (u32 i = 0; i < width; i++)
        value |= (u64)((const u8 *)bytes)[from + i] << 8 * i;
    return value;
}

static void memory(void)
{
    for (u32 edge = 0; edge < 5; edge++)
        for (u32 width = 1; width <= 8; width *= 2)
            for (u32 from = 4; from <= 12; from++) {
                u64 at = edges[edge] - 8 + from;
                u64 wanted = cut(around[edge], from, width);
                expect(at, width, get(at, width), wanted);
                put(at, width, 0x5a5a5a5a5a5a5a5a ^ wanted);
                expect(at, width, get(at, width), wanted);
            }
}

/* Ports: the power block's four, whose registers read as zero, and their neighbours. */
static void ports(void)
{
    for (u16 port = POWER - 4; port < POWER + 8; port++) {
        bool inside = port >= POWER && port < POWER + 4;
        u32 wanted = 0;
        for (u32 i = 0; i < 4; i++)
            if (!inside || port + i >= POWER + 4)
                wanted |= 0xffu << 8 * i;
        expect(port, 1, in8(port), (u8)wanted);
        expect(port, 2, in16(port), (u16)wanted);
        expect(port, 4, in32(port), wanted);
        out8(port, 0);
        out16(port, 0);
        out32(port, 0);
    }
}

void guest(const char *word)
{
    (void)word;
    for (u32 edge = 0; edge < 5; edge++)
        for (u32 i = 0; i < 24; i++)
            ((volatile u8 *)around[edge])[i] = shown(edges[edge] - 8 + i);
    say("the first page begins with", read32(VIRTIO));
    for (u64 round = 0;; round++) {
        write64(ROUNDS, round);
        memory();
        ports();
    }
}
