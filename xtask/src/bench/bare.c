// The least that a monitor does: a virtual machine with the memory, the interrupt controllers and
// the processor that the other monitors give it, and the same program in it, entered in 64-bit
// mode. What the guest writes to its serial port goes to standard output.
//
// bare FLAT MIB: FLAT is loaded at 16 MiB, and entered there. With other arguments it tells its
// compiler's version.
#include "machine.h"

#define SERIAL 0x3f8

int main(int count, char **words) {
    if (count != 3) {
        puts("compiled by cc " __VERSION__);
        return 0;
    }
    size_t size = strtoull(words[2], NULL, 10) << 20;
    int kvm = checked("/dev/kvm", open("/dev/kvm", O_RDWR | O_CLOEXEC));
    int vm = checked("KVM_CREATE_VM", ioctl(kvm, KVM_CREATE_VM, 0));
    checked("KVM_SET_TSS_ADDR", ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000));

    uint8_t *ram = make_ram(size);
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

    struct kvm_run *run;
    int vcpu = make_vcpu(kvm, vm, &run);
    for (;;) {
        checked("KVM_RUN", ioctl(vcpu, KVM_RUN, 0));
        if (run->exit_reason != KVM_EXIT_IO || run->io.port != SERIAL) {
            fprintf(stderr, "exit %u\n", run->exit_reason);
            return 1;
        }
        checked("write", write(STDOUT_FILENO, (uint8_t *)run + run->io.data_offset, 1));
    }
}
