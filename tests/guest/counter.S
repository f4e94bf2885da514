# The counter guest: a machine of one CPU that counts aloud on COM1.
#
# Tests of sleep and wake need a guest that boots in milliseconds and that tells
# when anything of it was lost.  This one prints about ten lines a second:
#
#     counter guest ready sum 1a2b3c4d      once, at boot
#     count 0000002a sum 1a2b3c4d           then for ever, one higher each time
#     counter guest quits                   last, if `quit=` asked for it
#
# The count goes up by one from line to line, so a lost or a repeated stretch of
# running shows as a gap or a repeat.  The sum is taken anew for every line over
# 256 KiB of pseudo-random memory that never changes after boot, so a lost or
# mixed-up page shows as another sum.  The count is kept in a register and in
# memory: the first comes back from the device state and the second from the
# memory file, and `counter guest torn` says that the two are of different saves.
#
# The kernel command line is words with blanks between; unknown words are skipped.
#
#     busy       never halts, so that the guest burns a whole CPU
#     touch=N    dirties one word in every page of N MiB from 16 MiB on, at boot;
#                the caller sees to it that the machine has 16 + N MiB
#     churn      dirties those pages again before every line
#     quit=N     turns the machine off after N lines, or resets it where that does
#                nothing; -no-reboot makes QEMU leave then
#     idle       prints its ready line and then halts for ever, with neither timer
#                nor interrupts, so that hundreds of guests take no CPU
#     poll=N     neither halts nor takes interrupts: it looks N times between two lines
#                whether somebody types, and types it back.  For KVMs that run such
#                code by an emulator, which has no interrupts for it
#     clock      tells KVM where it wants to find the wall clock, as every Linux does; KVM
#                writes there at once, and again whenever a VMM sets that register
#     send=N     with `poll=`: sends a datagram at each look, from the guest's address to N
#                (an IPv4 address as one number) port 4000, over the virtio-mmio network
#                device of QEMU's microvm, if there is one.  It says how many were sent
#                with it, and how many frames have come, each in four bytes, the lowest
#                first.  There is no interrupt and no timer between two of them
#     seed=N     starts the pattern elsewhere, so that guests differ in their sums
#
# It boots by the PVH protocol, which QEMU and Cloud Hypervisor share: 32-bit
# protected mode, flat segments, no paging, and the start info's address in %ebx.
# Of the hardware it uses only the local APIC and the UART, which every machine
# type has.  Cloud Hypervisor wants a 64-bit ELF, so 32-bit code lies in one.

        .set    COM1, 0x3f8
        .set    COM1_STATUS, COM1 + 5
        .set    CAN_SEND, 0x20            # "Transmitter holding register empty".
        .set    HAS_RECEIVED, 1           # "Data ready".
        .set    SEND_SPINS, 100000        # A UART that nobody drains costs a byte, not the guest.

        .set    SLEEP_CONTROL, 0x600      # Cloud Hypervisor's; QEMU's microvm has nothing there.
        .set    SLEEP_S5, 5 << 2 | 1 << 5 # "Sleep type 5, and do it."

        .set    APIC, 0xfee00000
        .set    APIC_EOI, APIC + 0x0b0
        .set    APIC_SPURIOUS, APIC + 0x0f0
        .set    APIC_TIMER, APIC + 0x320
        .set    APIC_LINT0, APIC + 0x350
        .set    APIC_TIMER_COUNT, APIC + 0x380
        .set    APIC_TIMER_DIVIDE, APIC + 0x3e0
        .set    APIC_ENABLE, 0x100
        .set    APIC_MASKED, 0x10000
        .set    APIC_PERIODIC, 0x20000
        .set    DIVIDE_BY_16, 3
        .set    TICK_COUNT, 625000        # 100 Hz, as the bus of QEMU and of KVM is 1 GHz.
        .set    TICKS_PER_LINE, 10

        .set    TICK_VECTOR, 0x20
        .set    SPURIOUS_VECTOR, 0xff
        .set    VECTORS, 256

        .set    WALL_CLOCK, 0x4b564d00    # KVM's register for where to write the wall clock.

        # QEMU's microvm has the registers of eight virtio devices, one after the other.
        .set    DEVICES, 0xfeb00000
        .set    DEVICE, 0x200
        .set    DEVICES_END, DEVICES + 8 * DEVICE
        .set    DEVICE_MAGIC, 0x74726976
        .set    DEVICE_KIND, 0x008
        .set    DEVICE_KIND_NETWORK, 1
        .set    DEVICE_FEATURES, 0x020
        .set    DEVICE_FEATURES_WORD, 0x024
        .set    DEVICE_VERSION_1, 1       # The first bit of the second word.
        .set    DEVICE_QUEUE, 0x030
        .set    DEVICE_QUEUE_SIZE, 0x038
        .set    DEVICE_QUEUE_READY, 0x044
        .set    DEVICE_NOTIFY, 0x050
        .set    DEVICE_STATUS, 0x070
        .set    DEVICE_DESCRIPTORS, 0x080 # Each of three addresses has a lower and a higher half.
        .set    DEVICE_OFFERED, 0x090
        .set    DEVICE_USED, 0x0a0
        .set    STATUS_DRIVER, 1 | 2      # "Seen, and known how to drive."
        .set    STATUS_FEATURES, STATUS_DRIVER | 8
        .set    STATUS_READY, STATUS_FEATURES | 4

        # A queue: descriptors, then what is offered to the device, then what it has used.
        .set    RECEIVING, 0
        .set    SENDING, 1
        .set    QUEUE_SIZE, 8
        .set    OFFERED, 128
        .set    USED, 256
        .set    QUEUE_BYTES, 512
        .set    QUIET, 1                  # "No interrupts."
        .set    WRITABLE, 2
        .set    RECEIVE_BYTES, 2048

        .set    GUEST, 0xa9fe0015         # 169.254.0.21
        .set    UDP_BYTES, 8 + 8
        .set    IP_BYTES, 20 + UDP_BYTES
        .set    IP_SUM, 0x4500 + IP_BYTES + 0x4000 + 0x4011 + GUEST / 0x10000 + (GUEST & 0xffff)

        .set    CODE, 8
        .set    DATA, 16

        .set    START_MAGIC, 0x336ec578
        .set    START_CMDLINE, 24
        .set    MARKER_WORDS, 256 * 1024 / 4
        .set    TOUCH_FROM, 16 << 20
        .set    PAGE, 4096
        .set    SPREAD, 0x9e3779b1        # Odd, so that no two pages get the same word.

# The note that makes the file a PVH kernel: type 18 is XEN_ELFNOTE_PHYS32_ENTRY.
# QEMU reads eight bytes of address out of a 64-bit ELF.
        .section .note.pvh, "a", @note
        .balign 4
        .long   4, 8, 18
        .asciz  "Xen"
        .quad   start

        .section .text, "ax", @progbits
        .code32
        .globl  start

# Sets up the CPU, reads the options, fills the memory and starts to count.
start:
        cli
        cld
        # The firmware's descriptors lie in memory that is not ours, so we bring our own.
        lgdt    gdt_pointer
        ljmp    $CODE, $1f
1:      movw    $DATA, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %fs
        movw    %ax, %gs
        movw    %ax, %ss
        movl    $stack_top, %esp

        # All of .bss is cleared here, since a loader may leave old memory in it
        # and a memory file may be one that an earlier guest has used.
        movl    $bss_start, %edi
        movl    $bss_words, %ecx
        xorl    %eax, %eax
        rep stosl

        # The options come first: the command line may lie where we are to write.
        cmpl    $START_MAGIC, (%ebx)
        jne     2f
        movl    START_CMDLINE(%ebx), %esi
        testl   %esi, %esi
        jz      2f
        call    read_options
2:
        cmpl    $0, poll
        jne     3f
        call    set_up_interrupts
3:      cmpl    $0, clock
        je      4f
        movl    $WALL_CLOCK, %ecx
        movl    $wall_clock, %eax
        xorl    %edx, %edx
        wrmsr
4:      call    fill_marker
        xorl    %ebp, %ebp                # %ebp is the count, and nothing else, from here on.
        call    touch_pages
        cmpl    $0, send
        je      5f
        call    set_up_network
5:
        movl    $ready_text, %esi
        call    print
        call    sum_marker
        call    print_hex
        call    end_line
        cmpl    $0, idle
        jne     rest

# Waits for ticks, and prints a line at every tenth.
count:
        movl    poll, %ecx
        testl   %ecx, %ecx
        jnz     listen
        sti
        movl    ticks, %eax
        movl    %eax, %edx
        subl    last_line, %edx
        cmpl    $TICKS_PER_LINE, %edx
        jae     2f
        cmpl    $0, busy
        jne     count
        # A tick between the look and the `hlt` would be slept over.  So we look
        # with interrupts off; `sti` lets none in before the next instruction is done.
        cli
        cmpl    ticks, %eax
        jne     1f
        sti
        hlt
1:      sti
        jmp     count

# Looks %ecx times whether somebody types, and sends a datagram each time.
listen:
        pushl   %ecx
        movw    $COM1_STATUS, %dx
        inb     %dx, %al
        testb   $HAS_RECEIVED, %al
        jz      1f
        movw    $COM1, %dx
        inb     %dx, %al
        call    print_byte
1:      cmpl    $0, send
        je      4f
        call    send_datagram
4:      popl    %ecx
        decl    %ecx
        jnz     listen
        jmp     3f

2:      movl    %eax, last_line           # Not ten more: a late guest makes no burst of lines.
3:      incl    %ebp
        incl    count_in_memory
        cmpl    %ebp, count_in_memory
        jne     torn
        cmpl    $0, churn
        je      4f
        call    touch_pages
4:      movl    $count_text, %esi
        call    print
        movl    %ebp, %eax
        call    print_hex
        movl    $sum_text, %esi
        call    print
        call    sum_marker
        call    print_hex
        call    end_line
        cmpl    %ebp, quit                # Without the option this is nought, which %ebp has left behind.
        jne     count
        movl    $quit_text, %esi
        call    print
        # Cloud Hypervisor ends at this, and would boot us again after a reset.
        movw    $SLEEP_CONTROL, %dx
        movb    $SLEEP_S5, %al
        outb    %al, %dx

# Resets the machine: with no interrupt table a breakpoint becomes a triple fault.
reset:
        cli
        lidt    empty_pointer
        int3

# Never does anything again.  The VMM keeps a timer for the APIC's as long as that
# one is not masked, whether or not the guest takes its interrupts.
rest:
        movl    $APIC_MASKED, APIC_TIMER
1:      hlt
        jmp     1b

# Memory and registers are of different moments.  There is no way to go on from that.
torn:
        movl    $torn_text, %esi
        call    print
        jmp     reset

# No exception is expected, so one means that the machine came back wrong.
fault:
        movl    $fault_text, %esi
        call    print
        jmp     reset

# The timer's interrupt.  It only notes the tick; the work is done in `count`.
tick:
        incl    ticks
        movl    $0, APIC_EOI
        iret

# A spurious interrupt must not be acknowledged.
spurious:
        iret

# Fills the interrupt table and starts the timer.  Interrupts stay off.
set_up_interrupts:
        movl    $fault, %eax
        xorl    %ecx, %ecx
1:      call    set_gate
        incl    %ecx
        cmpl    $VECTORS, %ecx
        jb      1b
        movl    $tick, %eax
        movl    $TICK_VECTOR, %ecx
        call    set_gate
        movl    $spurious, %eax
        movl    $SPURIOUS_VECTOR, %ecx
        call    set_gate
        lidt    idt_pointer

        # At reset LINT0 passes on the PIC, which nobody has programmed: where
        # there is one, its timer would come in as exception 0.
        movl    $APIC_MASKED, APIC_LINT0
        movl    $APIC_ENABLE | SPURIOUS_VECTOR, APIC_SPURIOUS
        movl    $DIVIDE_BY_16, APIC_TIMER_DIVIDE
        movl    $APIC_PERIODIC | TICK_VECTOR, APIC_TIMER
        movl    $TICK_COUNT, APIC_TIMER_COUNT
        ret

# Points vector %ecx at the handler in %eax.  Uses %edx.
set_gate:
        movl    %eax, %edx
        andl    $0xffff, %edx
        orl     $CODE << 16, %edx
        movl    %edx, idt(, %ecx, 8)
        movl    %eax, %edx
        andl    $0xffff0000, %edx
        orl     $0x8e00, %edx             # Present, ring 0, 32-bit interrupt gate.
        movl    %edx, idt + 4(, %ecx, 8)
        ret

# Finds the network device, and gives it a buffer to fill and a frame to send.  Without a
# device nothing is sent.
set_up_network:
        movl    $DEVICES, %ebx
1:      cmpl    $DEVICE_MAGIC, (%ebx)
        jne     2f
        cmpl    $DEVICE_KIND_NETWORK, DEVICE_KIND(%ebx)
        je      3f
2:      addl    $DEVICE, %ebx
        cmpl    $DEVICES_END, %ebx
        jb      1b
        movl    $0, send
        ret
3:      movl    %ebx, device
        movl    $frame_text, %esi
        movl    $frame, %edi
        movl    $FRAME_BYTES, %ecx
        rep movsb
        movl    send, %eax
        bswapl  %eax
        movl    %eax, frame_to
        movl    send, %eax
        movzwl  %ax, %edx
        shrl    $16, %eax
        leal    IP_SUM(%eax, %edx), %eax
        movl    %eax, %edx                # What is carried out is carried in again, twice.
        shrl    $16, %edx
        movzwl  %ax, %eax
        addl    %edx, %eax
        movl    %eax, %edx
        shrl    $16, %edx
        addl    %edx, %eax
        notl    %eax
        xchgb   %al, %ah
        movw    %ax, frame_sum

        movl    $0, DEVICE_STATUS(%ebx)
        movl    $STATUS_DRIVER, DEVICE_STATUS(%ebx)
        movl    $0, DEVICE_FEATURES_WORD(%ebx)
        movl    $0, DEVICE_FEATURES(%ebx)
        movl    $1, DEVICE_FEATURES_WORD(%ebx)
        movl    $DEVICE_VERSION_1, DEVICE_FEATURES(%ebx)
        movl    $STATUS_FEATURES, DEVICE_STATUS(%ebx)
        movl    $receive_buffer, receiving
        movl    $RECEIVE_BYTES, receiving + 8
        movw    $WRITABLE, receiving + 12
        movw    $1, receiving + OFFERED + 2
        movl    $receiving, %esi
        movl    $RECEIVING, %ecx
        call    set_up_queue
        movl    $frame, sending
        movl    $FRAME_BYTES, sending + 8
        movl    $sending, %esi
        movl    $SENDING, %ecx
        call    set_up_queue
        movl    $STATUS_READY, DEVICE_STATUS(%ebx)
        movl    $RECEIVING, DEVICE_NOTIFY(%ebx)
        ret

# Makes what is at %esi queue %ecx of the device at %ebx.  Uses %eax.
set_up_queue:
        movw    $QUIET, OFFERED(%esi)
        movl    %ecx, DEVICE_QUEUE(%ebx)
        movl    $QUEUE_SIZE, DEVICE_QUEUE_SIZE(%ebx)
        movl    %esi, DEVICE_DESCRIPTORS(%ebx)
        movl    $0, DEVICE_DESCRIPTORS + 4(%ebx)
        leal    OFFERED(%esi), %eax
        movl    %eax, DEVICE_OFFERED(%ebx)
        movl    $0, DEVICE_OFFERED + 4(%ebx)
        leal    USED(%esi), %eax
        movl    %eax, DEVICE_USED(%ebx)
        movl    $0, DEVICE_USED + 4(%ebx)
        movl    $1, DEVICE_QUEUE_READY(%ebx)
        ret

# Counts a frame that has come, and sends a datagram if the last one is gone.  Either queue
# has one buffer, which is offered again and again.  Uses %eax and %ebx.
send_datagram:
        movl    device, %ebx
        movw    receiving + USED + 2, %ax
        cmpw    receiving + OFFERED + 2, %ax
        jne     1f
        incl    frame_received
        incw    receiving + OFFERED + 2
        movl    $RECEIVING, DEVICE_NOTIFY(%ebx)
1:      movw    sending + USED + 2, %ax
        cmpw    sending + OFFERED + 2, %ax
        jne     2f
        incl    frame_sent
        incw    sending + OFFERED + 2
        movl    $SENDING, DEVICE_NOTIFY(%ebx)
2:      ret

# Fills the marker by xorshift32, which never comes to nought from another number.
fill_marker:
        movl    $0x2545f491, %eax
        xorl    seed, %eax
        jnz     1f
        incl    %eax
1:      movl    $marker, %edi
        movl    $MARKER_WORDS, %ecx
2:      movl    %eax, %edx
        shll    $13, %edx
        xorl    %edx, %eax
        movl    %eax, %edx
        shrl    $17, %edx
        xorl    %edx, %eax
        movl    %eax, %edx
        shll    $5, %edx
        xorl    %edx, %eax
        stosl
        loop    2b
        ret

# Returns in %eax the marker's sum.  It is rotated at every word, so that words
# or pages that changed places are seen too.
sum_marker:
        xorl    %eax, %eax
        movl    $marker, %esi
        movl    $MARKER_WORDS, %ecx
1:      roll    $1, %eax
        addl    (%esi), %eax
        addl    $4, %esi
        decl    %ecx
        jnz     1b
        ret

# Writes a word that depends on the page and on the count into each page to touch.
touch_pages:
        movl    touch, %ecx
        shll    $8, %ecx                  # There are 256 pages in a MiB.
        jz      2f
        movl    $TOUCH_FROM, %edi
1:      imull   $SPREAD, %edi, %eax
        addl    %ebp, %eax
        movl    %eax, (%edi)
        addl    $PAGE, %edi
        decl    %ecx
        jnz     1b
2:      ret

# Reads the command line at %esi into the option words.
read_options:
        cmpb    $0, (%esi)
        je      5f
        movl    $options, %ebx
1:      movl    (%ebx), %edi              # %edi is the option's name, %edx walks the word.
        testl   %edi, %edi
        jz      4f
        movl    %esi, %edx
2:      movb    (%edi), %al
        testb   %al, %al
        jz      3f
        cmpb    %al, (%edx)
        jne     6f
        incl    %edi
        incl    %edx
        jmp     2b
3:      call    read_value
        jnc     4f
6:      addl    $8, %ebx
        jmp     1b
4:      # Known or not, we go on behind the next blank.
        lodsb
        cmpb    $' ', %al
        je      read_options
        testb   %al, %al
        jnz     4b
5:      ret

# Stores the value of the option at %ebx, whose name ends before %edi and was
# found to end before %edx in the command line.  Carry says that it only seemed
# to be the option, as with `busybody`.
read_value:
        xorl    %ecx, %ecx
        cmpb    $'=', -1(%edi)
        jne     2f
1:      movzbl  (%edx), %eax
        subl    $'0', %eax
        cmpl    $9, %eax
        ja      3f
        imull   $10, %ecx
        addl    %eax, %ecx
        incl    %edx
        jmp     1b
2:      incl    %ecx                      # A word without a value is on or off.
3:      cmpb    $0, (%edx)
        je      4f
        cmpb    $' ', (%edx)
        je      4f
        stc
        ret
4:      movl    4(%ebx), %eax
        movl    %ecx, (%eax)
        clc
        ret

# Prints %eax as eight hexadecimal digits.
print_hex:
        movl    %eax, %ebx
        movl    $8, %edi
1:      roll    $4, %ebx
        movl    %ebx, %eax
        andl    $15, %eax
        movb    digits(%eax), %al
        call    print_byte
        decl    %edi
        jnz     1b
        ret

# Ends the line.
end_line:
        movb    $'\n', %al
        jmp     print_byte

# Prints the text at %esi up to its nought.
print:
        lodsb
        testb   %al, %al
        jz      1f
        call    print_byte
        jmp     print
1:      ret

# Sends %al, as soon as the UART takes it or after we have waited long enough.
# Uses %eax, %ecx and %edx.
print_byte:
        movb    %al, %ah
        movl    $SEND_SPINS, %ecx
        movw    $COM1_STATUS, %dx
1:      inb     %dx, %al
        testb   $CAN_SEND, %al
        jnz     2f
        decl    %ecx
        jnz     1b
2:      movw    $COM1, %dx
        movb    %ah, %al
        outb    %al, %dx
        ret

        .section .rodata, "a", @progbits
        .balign 8
gdt:    .quad   0
        .quad   0x00cf9a000000ffff        # CODE: 4 GiB from nought, execute and read.
        .quad   0x00cf92000000ffff        # DATA: 4 GiB from nought, read and write.
gdt_end:
gdt_pointer:
        .word   gdt_end - gdt - 1
        .long   gdt
idt_pointer:
        .word   VECTORS * 8 - 1
        .long   idt
empty_pointer:
        .word   0
        .long   0

        .balign 4
options:
        .long   busy_name, busy
        .long   churn_name, churn
        .long   touch_name, touch
        .long   quit_name, quit
        .long   seed_name, seed
        .long   idle_name, idle
        .long   poll_name, poll
        .long   clock_name, clock
        .long   send_name, send
        .long   0
busy_name:  .asciz "busy"
churn_name: .asciz "churn"
touch_name: .asciz "touch="
quit_name:  .asciz "quit="
seed_name:  .asciz "seed="
idle_name:  .asciz "idle"
poll_name:  .asciz "poll="
clock_name: .asciz "clock"
send_name:  .asciz "send="

# What is sent: the header of virtio, then Ethernet, IPv4 and UDP.  Sums that are nought are
# not looked at.
frame_text:
        .skip   12
        .byte   0x02, 0xfc, 0, 0, 0, 6    # To the gateway, from the guest, as all have them.
        .byte   0x02, 0xfc, 0, 0, 0, 5
        .byte   0x08, 0x00
        .byte   0x45, 0, 0, IP_BYTES, 0, 0, 0x40, 0, 64, 17, 0, 0
        .byte   169, 254, 0, 21
        .skip   4
        .byte   5000 >> 8, 5000 & 255, 4000 >> 8, 4000 & 255, 0, UDP_BYTES, 0, 0
        .skip   8
        .set    FRAME_BYTES, . - frame_text
        .set    frame_sum, frame + 12 + 14 + 10
        .set    frame_to, frame + 12 + 14 + 16
        .set    frame_sent, frame + FRAME_BYTES - 8
        .set    frame_received, frame + FRAME_BYTES - 4

ready_text: .asciz "counter guest ready sum "
count_text: .asciz "count "
sum_text:   .asciz " sum "
quit_text:  .asciz "counter guest quits\n"
torn_text:  .asciz "counter guest torn\n"
fault_text: .asciz "counter guest faults\n"
digits:     .ascii "0123456789abcdef"

        .section .bss, "aw", @nobits
        .balign 4096
marker: .skip   MARKER_WORDS * 4
idt:    .skip   VECTORS * 8
receiving:       .skip QUEUE_BYTES
sending:         .skip QUEUE_BYTES
receive_buffer:  .skip RECEIVE_BYTES
stack:  .skip   4096
stack_top:
ticks:           .skip 4
last_line:       .skip 4
count_in_memory: .skip 4
busy:            .skip 4
churn:           .skip 4
touch:           .skip 4
quit:            .skip 4
seed:            .skip 4
idle:            .skip 4
poll:            .skip 4
clock:           .skip 4
send:            .skip 4
device:          .skip 4
frame:           .skip 64
wall_clock:      .skip 12              # Its version, seconds and nanoseconds.
