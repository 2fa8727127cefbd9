"""Generated C++ kernels: what decides the speed of decode on a CPU, built with the machine's compiler."""
