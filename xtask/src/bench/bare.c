// The least that a monitor does: a virtual machine with the memory, the interrupt controllers and
// the processor that the other monitors give it, and the same program in it, entered in 64-bit
// mode. What the guest writes to its serial port goes to standard output.
//
// bare FLAT MIB: FLAT is loaded at 16 MiB, and entered there. With other arguments it tells its
// compiler's version.
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <linux/kvm.h>

#define ENTRY 0x1000000u
#define TABLES 0x9000u
#define SERIAL 0x3f8

static long checked(const char *what, long result) {
    if (result < 0) {
        perror(what);
        exit(1);
    }
    return result;
}

// Four GiB, each page of 2 MiB at its own address.
static void make_tables(uint8_t *ram) {
    uint64_t *top = (uint64_t *)(ram + TABLES);
    uint64_t *upper = top + 512, *lower = top + 1024;
    top[0] = (TABLES + 0x1000) | 3;
    for (uint64_t gib = 0; gib < 4; gib++)
        upper[gib] = (TABLES + 0x2000 + gib * 0x1000) | 3;
    for (uint64_t page = 0; page < 2048; page++)
        lower[page] = (page << 21) | 0x83;
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

int main(int count, char **words) {
    if (count != 3) {
        puts("compiled by cc " __VERSION__);
        return 0;
    }
    size_t size = strtoull(words[2], NULL, 10) << 20;
    int kvm = checked("/dev/kvm", open("/dev/kvm", O_RDWR | O_CLOEXEC));
    int vm = checked("KVM_CREATE_VM", ioctl(kvm, KVM_CREATE_VM, 0));
    checked("KVM_SET_TSS_ADDR", ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000));

    uint8_t *ram = mmap(NULL, size, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (ram == MAP_FAILED)
        checked("mmap", -1);
    int flat = checked(words[1], open(words[1], O_RDONLY | O_CLOEXEC));
    checked("read", read(flat, ram + ENTRY, size - ENTRY));
    make_tables(ram);
    struct kvm_userspace_memory_region region = {
        .memory_size = size, .userspace_addr = (uintptr_t)ram,
    };
    checked("KVM_SET_USER_MEMORY_REGION", ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region));
    checked("KVM_CREATE_IRQCHIP", ioctl(vm, KVM_CREATE_IRQCHIP, 0));
    struct kvm_pit_config pit = { .flags = KVM_PIT_SPEAKER_DUMMY };
    checked("KVM_CREATE_PIT2", ioctl(vm, KVM_CREATE_PIT2, &pit));

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
    for (;;) {
        checked("KVM_RUN", ioctl(vcpu, KVM_RUN, 0));
        if (run->exit_reason != KVM_EXIT_IO || run->io.port != SERIAL) {
            fprintf(stderr, "exit %u\n", run->exit_reason);
            return 1;
        }
        checked("write", write(STDOUT_FILENO, (uint8_t *)run + run->io.data_offset, 1));
    }
}
