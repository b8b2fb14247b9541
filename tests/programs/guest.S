# A guest of a few instructions, for Firecracker (tests/test_firecracker_program.py): fill scattered pages, say R, wait for a byte on the serial
# port (the snapshot is taken there), then check every page and report.
# Where KVM emulates each instruction comparing all would take long: a page is filled whole, but only WINDOW
# words of it are compared, at another place in each page; WINDOW=512 compares all.
# Entry: Linux 64-bit boot protocol: long mode, identity map of the first GiB (2 MiB pages), rsp set.
#   each of the 512 words of the page at address a holds  (a ^ SEED) * MUL
#   page i (0..PAGES) is at BASE + ((i * STEP) mod SPAN) * 4096: STEP odd, SPAN a power of two: no page twice
#   page i = 7 mod 8: the first access after the restore is a write (of the same word), then checked like the others
#   pages i = PAGES..PAGES+ZEROS of the same order were never touched: must read as zeros; every 4th is first written
.code64
.equ COM,   0x3f8
.equ BASE,  0x1000000
.ifndef PAGES
.equ PAGES, 2048
.endif
.ifndef WINDOW
.equ WINDOW, 64
.endif
.equ ZEROS, 256
.equ SPAN,  16384            # 64 MiB
.equ STEP,  7919
.set SEED,  0x5eed5eed5eed5eed
.set MUL,   0x9e3779b97f4a7c15
.text
.globl _start
_start:
    mov  $0x200000, %rsp     # a stack page of our own
    mov  $'B', %al
    call putc
    mov  $SEED, %r14
    mov  $MUL, %r15

    cld
# ---- fill
    xor  %ebx, %ebx
1:  call page
    rep stosq
    inc  %ebx
    cmp  $PAGES, %ebx
    jb   1b
    mov  $'R', %al          # ready
    call putc
    mov  $'\n', %al
    call putc

# ---- wait for a byte
3:  mov  $COM+5, %dx
    in   %dx, %al
    pause
    test $1, %al
    jz   3b
    mov  $COM, %dx
    in   %dx, %al

# ---- check: r8 good pages, r9 bad pages, r10 sum, r11 good zero pages, r12 bad zero pages, r13 first bad address
    xor  %r8d, %r8d
    xor  %r9d, %r9d
    xor  %r10d, %r10d
    xor  %r11d, %r11d
    xor  %r12d, %r12d
    xor  %r13d, %r13d
    xor  %ebx, %ebx
4:  call page
    mov  %ebx, %edx
    and  $7, %edx
    cmp  $7, %edx
    jne  5f
    mov  %rax, 2048(%rdi)    # the first access is a write
5:  mov  %rdi, %rsi
    call window
    repe scasq
    jne  6f
    inc  %r8
    jmp  7f
6:  inc  %r9
    test %r13, %r13
    cmovz %rsi, %r13
7:  add  (%rsi), %r10
    inc  %ebx
    cmp  $PAGES, %ebx
    jb   4b

10: call page                # pages that were never touched
    xor  %eax, %eax
    test $3, %bl
    jnz  11f
    mov  %rax, 2048(%rdi)
11: call window
    repe scasq
    jne  12f
    inc  %r11
    jmp  13f
12: inc  %r12
13: inc  %ebx
    cmp  $PAGES+ZEROS, %ebx
    jb   10b

    mov  $'V', %al
    call putc
    mov  %r8, %rsi
    call hex
    mov  %r9, %rsi
    call hex
    mov  %r11, %rsi
    call hex
    mov  %r12, %rsi
    call hex
    mov  %r10, %rsi
    call hex
    mov  %r13, %rsi
    call hex
    mov  $'\n', %al
    call putc
15: cli
    hlt
    jmp  15b

page:                        # rdi = address of page ebx, rax = its word, ecx = words of a page
    imul $STEP, %ebx, %edi
    and  $SPAN-1, %edi
    shl  $12, %rdi
    add  $BASE, %rdi
    mov  %rdi, %rax
    xor  %r14, %rax
    imul %r15, %rax
    mov  $512, %ecx
    ret
window:                      # moves rdi to the words of page ebx that are compared, ecx = how many
    mov  %ebx, %edx
    and  $(512/WINDOW-1), %edx
    imul $(8*WINDOW), %edx, %edx
    add  %rdx, %rdi
    mov  $WINDOW, %ecx
    ret
putc:
    mov  $COM, %dx
    out  %al, %dx
    ret
hex:                         # ' ' and rsi in hex, 16 digits
    mov  $' ', %al
    call putc
    mov  $16, %ecx
16: rol  $4, %rsi
    mov  %esi, %eax
    and  $15, %al
    cmp  $10, %al
    jb   17f
    add  $'a'-10-'0', %al
17: add  $'0', %al
    call putc
    dec  %ecx
    jnz  16b
    ret
