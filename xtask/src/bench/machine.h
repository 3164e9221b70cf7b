// A virtual machine with one processor in 64-bit mode, made with nothing but KVM.
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <linux/kvm.h>

// Where the guest begins, and its page tables.
#define ENTRY 0x1000000u
#define TABLES 0x9000u

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

static void *mapped(size_t size, int flags, int file) {
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, file, 0);
    if (memory == MAP_FAILED)
        checked("mmap", -1);
    return memory;
}

static uint8_t *make_ram(size_t size) {
    return mapped(size, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1);
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

// The processor, at ENTRY, and what it shares with the kernel.
static int make_vcpu(int kvm, int vm, struct kvm_run **run) {
    int vcpu = checked("KVM_CREATE_VCPU", ioctl(vm, KVM_CREATE_VCPU, 0));
    static struct {
        struct kvm_cpuid2 head;
        struct kvm_cpuid_entry2 entries[128];
    } cpuid = { .head.nent = 128 };
    checked("KVM_GET_SUPPORTED_CPUID", ioctl(kvm, KVM_GET_SUPPORTED_CPUID, &cpuid));
    checked("KVM_SET_CPUID2", ioctl(vcpu, KVM_SET_CPUID2, &cpuid));
    enter_64_bit(vcpu);
    size_t shared = checked("KVM_GET_VCPU_MMAP_SIZE", ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0));
    *run = mapped(shared, MAP_SHARED, vcpu);
    return vcpu;
}
