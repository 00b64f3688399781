// Turns a fault of a kernel (a wild address, an integer division by zero) into an error of its dispatch.
#ifndef METALSTEP_FAULTS_H
#define METALSTEP_FAULTS_H
#include <stdbool.h>

// Before the calling thread first runs kernels, and when it ends; false without memory. Beyond 256 threads faults are not
// caught.
bool sim_catch_faults(void);
void sim_release_faults(void);

// Told of a fault at `address` while its handler runs: true, and the thread goes on in `landing` on the stack that ends at
// `top`; false if no kernel is running on this thread.
bool sim_fault(int signal, const void* address, void (**landing)(void), char** top);

#endif
