#define _GNU_SOURCE  // ucontext's registers
#include "faults.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <ucontext.h>

enum { SIGNAL_STACK_BYTES = 64 << 10, MAX_THREADS = 256 };

// Threads that run kernels. Others must not come to a thread's own variables: they may have none yet, and a handler may not
// allocate them.
static _Atomic(pthread_t) known[MAX_THREADS];

static bool is_known(void) {
  for (int i = 0; i < MAX_THREADS; i++)
    if (atomic_load(&known[i]) == pthread_self()) return true;
  return false;
}

static bool replace(pthread_t from, pthread_t to) {
  for (int i = 0; i < MAX_THREADS; i++) {
    pthread_t present = from;
    if (atomic_compare_exchange_strong(&known[i], &present, to)) return true;
  }
  return false;
}

static const int signals[] = {SIGSEGV, SIGBUS, SIGFPE};
enum { SIGNALS = sizeof signals / sizeof *signals };
static struct sigaction before[SIGNALS];

static void handle(int signal, siginfo_t* info, void* context) {
  ucontext_t* registers = context;
  void (*landing)(void);
  char* top;
  if (!is_known() || !sim_fault(signal, info->si_addr, &landing, &top)) {
    for (int i = 0; i < SIGNALS; i++)
      if (signals[i] == signal) sigaction(signal, &before[i], NULL);
    return;  // and it happens again, to whom it belongs
  }
#if defined(__x86_64__)
  registers->uc_mcontext.gregs[REG_RSP] = (greg_t)(top - 8);  // as after a call
  registers->uc_mcontext.gregs[REG_RIP] = (greg_t)landing;
#elif defined(__aarch64__)
  registers->uc_mcontext.sp = (unsigned long long)top;
  registers->uc_mcontext.pc = (unsigned long long)landing;
#endif
}

static void install(void) {
  struct sigaction action = {.sa_sigaction = handle, .sa_flags = SA_SIGINFO | SA_ONSTACK};
  for (int i = 0; i < SIGNALS; i++) sigaction(signals[i], &action, &before[i]);
}

bool sim_catch_faults(void) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, install);
  if (is_known()) return true;
  void* stack = malloc(SIGNAL_STACK_BYTES);
  if (!stack) return false;
  if (!replace(0, pthread_self())) {
    free(stack);
    return true;  // and a fault ends the process
  }
  sigaltstack(&(stack_t){.ss_sp = stack, .ss_size = SIGNAL_STACK_BYTES}, NULL);
  sigset_t own;  // a fault while its signal is blocked ends the process
  sigemptyset(&own);
  for (int i = 0; i < SIGNALS; i++) sigaddset(&own, signals[i]);
  return pthread_sigmask(SIG_UNBLOCK, &own, NULL) == 0;
}

void sim_release_faults(void) {
  stack_t present;
  if (!replace(pthread_self(), 0)) return;
  sigaltstack(&(stack_t){.ss_flags = SS_DISABLE}, &present);
  free(present.ss_sp);
}
