/* The entries of the boot processor and of the others. */
        .section .note.GNU-stack, "", @progbits
        .section .text.start, "ax"
        .code64
        .globl _start
_start:                                 /* rsi: the zero page */
        mov $boot_stack, %esp
        mov %rsi, %rdi
        call start
1:      cli
        hlt
        jmp 1b

/* Other processors begin here in real mode, copied to TRAMPOLINE. They take the boot processor's
   descriptors and page tables, at the addresses that the monitor gives them. */
        .text
        .globl trampoline, trampoline_end
        .code16
trampoline:
        cli
        mov %cs, %ax
        mov %ax, %ds
        lgdtl gdt - trampoline
        mov $0x20, %eax                 /* PAE */
        mov %eax, %cr4
        mov $0x9000, %eax
        mov %eax, %cr3
        mov $0xc0000080, %ecx           /* EFER */
        mov $0x100, %eax                /* LME */
        xor %edx, %edx
        wrmsr
        mov $0x80000011, %eax           /* PG, ET, PE */
        mov %eax, %cr0
        ljmpl $0x10, $other
gdt:    .word 6 * 8 - 1
        .long 0x500
trampoline_end:

        .code64
other:
        mov $0x18, %eax
        mov %eax, %ds
        mov %eax, %es
        mov %eax, %ss
        mov $1, %eax
        lock xadd %eax, others_started
        inc %eax                        /* its number: the boot processor has 0 */
        mov %eax, %edi
        shl $12, %eax
        lea other_stacks(%rax), %rsp
        call processor
1:      cli
        hlt
        jmp 1b

        .bss
        .globl others_started
others_started:
        .long 0
        .balign 4096
        .skip 16384
boot_stack:
other_stacks:                           /* number n's ends n pages further */
        .skip 4096 * 16
