// The least that a checkpoint is: a virtual machine with one processor, which a timer stops; the
// thread that runs it finds out which pages were written, copies them, and enters the guest again.
// No other thread, no devices, no state.
//
// epochs PAGES PERIOD COUNT MIB: a guest of MIB MiB writes to PAGES pages, 64 KiB apart, in each of
// COUNT periods of PERIOD microseconds. For each it prints the pages, and the microseconds of the
// whole pause, of finding the pages, and of copying them.
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <time.h>

#include "machine.h"

#define WORD 0x1001000u
#define AREA 0x1010000u
#define APART 0x10000u
#define PAGE 4096u

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}

// Waits until WORD is not zero, makes it zero, adds 1 to a word of each page, and begins again.
static void make_program(uint8_t *ram, uint32_t pages) {
    uint8_t code[] = {
        0xbb, 0, 0, 0, 0,              // mov ebx, WORD
        0x83, 0x3b, 0,                 // wait: cmp dword [rbx], 0
        0x74, 0xfb,                    // je wait
        0xc7, 0x03, 0, 0, 0, 0,        // mov dword [rbx], 0
        0xbf, 0, 0, 0, 0,              // mov edi, AREA
        0xb9, 0, 0, 0, 0,              // mov ecx, pages
        0x48, 0xff, 0x07,              // next: inc qword [rdi]
        0x48, 0x81, 0xc7, 0, 0, 0, 0,  // add rdi, APART
        0xff, 0xc9,                    // dec ecx
        0x75, 0xf2,                    // jnz next
        0xeb, 0xdb,                    // jmp wait
    };
    uint32_t word = WORD, area = AREA, apart = APART;
    memcpy(code + 1, &word, 4);
    memcpy(code + 17, &area, 4);
    memcpy(code + 22, &pages, 4);
    memcpy(code + 32, &apart, 4);
    memcpy(ram + ENTRY, code, sizeof code);
}

// Signals do nothing but end KVM_RUN.
static void nothing(int signal) { (void)signal; }

static void tick_every(long period) {
    struct sigaction action = { .sa_handler = nothing };
    checked("sigaction", sigaction(SIGRTMIN, &action, NULL));
    timer_t timer;
    struct sigevent event = { .sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN };
    checked("timer_create", timer_create(CLOCK_MONOTONIC, &event, &timer));
    struct timespec each = { .tv_sec = period / 1000000, .tv_nsec = period % 1000000 * 1000 };
    struct itimerspec setting = { .it_interval = each, .it_value = each };
    checked("timer_settime", timer_settime(timer, 0, &setting, NULL));
}

int main(int count, char **words) {
    if (count != 5) {
        fputs("epochs PAGES PERIOD COUNT MIB\n", stderr);
        return 1;
    }
    uint32_t pages = strtoul(words[1], NULL, 10);
    long period = strtol(words[2], NULL, 10), epochs = strtol(words[3], NULL, 10);
    size_t size = strtoull(words[4], NULL, 10) << 20;
    if (AREA + (size_t)pages * APART > size || size > 2ul << 30) {
        fprintf(stderr, "%u pages do not fit into %zu bytes\n", pages, size);
        return 1;
    }
    int kvm = checked("/dev/kvm", open("/dev/kvm", O_RDWR | O_CLOEXEC));
    int vm = checked("KVM_CREATE_VM", ioctl(kvm, KVM_CREATE_VM, 0));
    checked("KVM_SET_TSS_ADDR", ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000));
    uint8_t *ram = make_ram(size);
    make_tables(ram);
    make_program(ram, pages);
    struct kvm_userspace_memory_region region = {
        .flags = KVM_MEM_LOG_DIRTY_PAGES, .memory_size = size, .userspace_addr = (uintptr_t)ram,
    };
    checked("KVM_SET_USER_MEMORY_REGION", ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region));
    checked("KVM_CREATE_IRQCHIP", ioctl(vm, KVM_CREATE_IRQCHIP, 0));
    struct kvm_run *run;
    int vcpu = make_vcpu(kvm, vm, &run);

    uint64_t words_of_log = size / PAGE / 64;
    uint64_t *log = calloc(words_of_log, 8);
    size_t room = (size_t)(pages + 64) * PAGE;
    uint8_t *copies = malloc(room);
    if (!log || !copies)
        checked("malloc", -1);
    memset(copies, 1, room);
    struct kvm_dirty_log dirty = { .dirty_bitmap = log };
    uint32_t *word = (uint32_t *)(ram + WORD);
    *word = 1;
    tick_every(period);
    // The first ones find out which pages there are at all.
    for (long epoch = -3; epoch < epochs;) {
        if (ioctl(vcpu, KVM_RUN, 0) == 0 || errno != EINTR) {
            fprintf(stderr, "exit %u, %s\n", run->exit_reason, strerror(errno));
            return 1;
        }
        double began = now();
        checked("KVM_GET_DIRTY_LOG", ioctl(vm, KVM_GET_DIRTY_LOG, &dirty));
        double found = now();
        uint32_t copied = 0;
        for (uint64_t i = 0; i < words_of_log; i++)
            for (uint64_t bits = log[i]; bits; bits &= bits - 1) {
                size_t at = (i * 64 + __builtin_ctzll(bits)) * PAGE;
                if ((copied + 1) * (size_t)PAGE <= room)
                    memcpy(copies + copied * (size_t)PAGE, ram + at, PAGE);
                copied++;
            }
        double done = now();
        *(volatile uint32_t *)word = 1;
        if (epoch++ >= 0)
            printf("%u %.1f %.1f %.1f\n", copied, done - began, found - began, done - found);
    }
    return 0;
}
