// Leaves one stack for another. The state that the C calling convention lets a callee destroy is not kept.
#ifndef METALSTEP_FIBER_SWITCH_H
#define METALSTEP_FIBER_SWITCH_H
#include <string.h>

// Saves the present stack in *from and continues on `to`.
void sim_switch(void** from, void* to);

#if defined(__APPLE__)
#define SIM_SYMBOL "_sim_switch"
#else
#define SIM_SYMBOL "sim_switch"
#endif

#if defined(__x86_64__)
__asm__(".text\n.p2align 4\n" SIM_SYMBOL
        ":\n"
        " pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
        " movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
        " popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");

// A stack that starts in `body` when it is first switched to. `top` is 16-byte aligned.
static void* sim_stack_start(char* top, void (*body)(void)) {
  void** slot = (void**)top;
  *--slot = NULL;  // body's return address: it never returns, and debuggers stop here
  *--slot = (void*)body;
  for (int i = 0; i < 6; i++) *--slot = NULL;
  return slot;
}
#elif defined(__aarch64__)
__asm__(".text\n.p2align 4\n" SIM_SYMBOL
        ":\n"
        " sub sp, sp, #160\n"
        " stp x19, x20, [sp]\n stp x21, x22, [sp, #16]\n stp x23, x24, [sp, #32]\n stp x25, x26, [sp, #48]\n"
        " stp x27, x28, [sp, #64]\n stp x29, x30, [sp, #80]\n"
        " stp d8, d9, [sp, #96]\n stp d10, d11, [sp, #112]\n stp d12, d13, [sp, #128]\n stp d14, d15, [sp, #144]\n"
        " mov x9, sp\n str x9, [x0]\n mov sp, x1\n"
        " ldp x19, x20, [sp]\n ldp x21, x22, [sp, #16]\n ldp x23, x24, [sp, #32]\n ldp x25, x26, [sp, #48]\n"
        " ldp x27, x28, [sp, #64]\n ldp x29, x30, [sp, #80]\n"
        " ldp d8, d9, [sp, #96]\n ldp d10, d11, [sp, #112]\n ldp d12, d13, [sp, #128]\n ldp d14, d15, [sp, #144]\n"
        " add sp, sp, #160\n ret\n");

static void* sim_stack_start(char* top, void (*body)(void)) {
  char* frame = top - 160;
  memset(frame, 0, 160);
  memcpy(frame + 88, &body, sizeof body);  // x30: where the last `ret` goes
  return frame;
}
#else
#error "the Metal simulator knows how to switch stacks on x86-64 and arm64 only"
#endif
#endif
