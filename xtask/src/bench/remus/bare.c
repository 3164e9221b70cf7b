// The least that a checkpoint is: a virtual machine with one processor, which a timer stops; the
// thread that runs it finds out which pages were written, copies them, and enters the guest again.
// No other thread, no devices, no state.
//
// bare PAGES PERIOD COUNT MIB: a guest of MIB MiB writes to PAGES pages, 64 KiB apart, in each of
// COUNT periods of PERIOD microseconds. For each it prints the pages, and the microseconds of the
// whole pause, of finding the pages, and of copying them.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <linux/kvm.h>

#define ENTRY 0x1000000u
#define WORD 0x1001000u
#define AREA 0x1010000u
#define APART 0x10000u
#define TABLES 0x9000u
#define PAGE 4096u

static long checked(const char *what, long result) {
    if (result < 0) {
        perror(what);
        exit(1);
    }
    return result;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}

// The first two GiB, each page of 2 MiB at its own address.
static void make_tables(uint8_t *ram) {
    uint64_t *top = (uint64_t *)(ram + TABLES), *upper = top + 512, *lower = top + 1024;
    top[0] = (TABLES + 0x1000) | 3;
    for (uint64_t gib = 0; gib < 2; gib++)
        upper[gib] = (TABLES + 0x2000 + gib * 0x1000) | 3;
    for (uint64_t page = 0; page < 1024; page++)
        lower[page] = (page << 21) | 0x83;
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

static void enter_64_bit(int vcpu) {
    struct kvm_sregs s;
    checked("KVM_GET_SREGS", ioctl(vcpu, KVM_GET_SREGS, &s));
    struct kvm_segment code = {
        .limit = 0xffffffff, .selector = 0x10, .type = 11, .present = 1, .s = 1, .l = 1, .g = 1,
    };
    struct kvm_segment data = {
        .limit = 0xffffffff, .selector = 0x18, .type = 3, .present = 1, .s = 1, .db = 1, .g = 1,
    };
    s.cs = code;
    s.ds = s.es = s.fs = s.gs = s.ss = data;
    s.cr3 = TABLES;
    s.cr4 |= 0x20;
    s.cr0 |= 0x80000001;
    s.efer |= 0x500;
    checked("KVM_SET_SREGS", ioctl(vcpu, KVM_SET_SREGS, &s));
    struct kvm_regs r = { .rip = ENTRY, .rflags = 2, .rsp = 0x8ff0 };
    checked("KVM_SET_REGS", ioctl(vcpu, KVM_SET_REGS, &r));
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
        puts("compiled by cc " __VERSION__);
        return 0;
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
    uint8_t *ram = mmap(NULL, size, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (ram == MAP_FAILED)
        checked("mmap", -1);
    make_tables(ram);
    make_program(ram, pages);
    struct kvm_userspace_memory_region region = {
        .flags = KVM_MEM_LOG_DIRTY_PAGES, .memory_size = size, .userspace_addr = (uintptr_t)ram,
    };
    checked("KVM_SET_USER_MEMORY_REGION", ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region));
    checked("KVM_CREATE_IRQCHIP", ioctl(vm, KVM_CREATE_IRQCHIP, 0));
    int vcpu = checked("KVM_CREATE_VCPU", ioctl(vm, KVM_CREATE_VCPU, 0));
    static struct {
        struct kvm_cpuid2 head;
        struct kvm_cpuid_entry2 entries[128];
    } cpuid = { .head.nent = 128 };
    checked("KVM_GET_SUPPORTED_CPUID", ioctl(kvm, KVM_GET_SUPPORTED_CPUID, &cpuid));
    checked("KVM_SET_CPUID2", ioctl(vcpu, KVM_SET_CPUID2, &cpuid));
    enter_64_bit(vcpu);
    int shared = checked("KVM_GET_VCPU_MMAP_SIZE", ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0));
    struct kvm_run *run = mmap(NULL, shared, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
    if (run == MAP_FAILED)
        checked("mmap", -1);

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
