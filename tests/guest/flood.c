/* Keeps the queues of all disks full of WRITE_ZEROES, each of the largest size allowed. FLUSH is
   not negotiated. Prints "floods!" once all queues are full. */
#include "virtio.h"

#define F_WRITE_ZEROES (1ull << 14)
#define WRITE_ZEROES 13
#define BLOCK 2
#define DISKS 8
#define MAX_WRITE_ZEROES_SECTORS 48

static struct queue queues[DISKS];
static volatile struct {
    u32 type;
    u32 reserved;
    u64 sector;
} header = {WRITE_ZEROES, 0, 0};
static volatile struct {
    u64 sector;
    u32 sectors;
    u32 flags;
} ranges[DISKS];
static volatile u8 status[DISKS][SIZE];
/* A request takes only one descriptor of the queue, so that as many as possible fit. */
static volatile struct descriptor tables[DISKS][SIZE][3] __attribute__((aligned(16)));

static u32 least(u32 one, u32 other)
{
    return one < other ? one : other;
}

static void fill(u32 disk)
{
    struct queue *queue = &queues[disk];
    if (!drive(disk, F_VERSION_1 | F_INDIRECT | F_WRITE_ZEROES, queue)) {
        say("WRONG the device does not begin: status", get(disk, STATUS));
        halt();
    }
    ranges[disk].sectors =
        least(get(disk, CONFIG), get(disk, CONFIG + MAX_WRITE_ZEROES_SECTORS));
    for (u16 i = 0; i < SIZE; i++) {
        volatile struct descriptor *table = tables[disk][i];
        table[0] = (struct descriptor){(u64)&header, 16, NEXT, 1};
        table[1] = (struct descriptor){(u64)&ranges[disk], 16, NEXT, 2};
        table[2] = (struct descriptor){(u64)&status[disk][i], 1, WRITE, 0};
        describe(queue, i, table, 3 * sizeof *table, INDIRECT, 0);
        queue->available.ring[i] = i;
    }
    barrier();
    queue->available.index = SIZE;
    barrier();
    set(disk, QUEUE_NOTIFY, 0);
}

/* Makes the requests that the device has finished available again. */
static void refill(u32 disk)
{
    struct queue *queue = &queues[disk];
    u16 used = queue->used.index;
    if (used == queue->seen)
        return;
    barrier();
    for (; queue->seen != used; queue->seen++) {
        u16 head = (u16)queue->used.ring[queue->seen % SIZE].id;
        if (status[disk][head] != 0) {
            say("WRONG status of WRITE_ZEROES", status[disk][head]);
            halt();
        }
        queue->available.ring[queue->available.index % SIZE] = head;
        barrier();
        queue->available.index++;
    }
    barrier();
    set(disk, QUEUE_NOTIFY, 0);
}

void guest(const char *word)
{
    (void)word;
    u32 disks = 0;
    while (disks < DISKS && get(disks, DEVICE_ID) == BLOCK && get(disks, CONFIG))
        fill(disks++);
    print("floods!\n");
    for (;;)
        for (u32 disk = 0; disk < disks; disk++)
            refill(disk);
}
