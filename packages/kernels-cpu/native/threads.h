// Threads of the OpenMP runtime that the process has loaded already; nothing is linked.
#pragma once

namespace qcpu {

using Job = void (*)(void* argument, int thread);

// Calls job(argument, thread) on up to `threads` threads at once, at least on this one, and waits for all. A job takes
// its parts from a counter, so that fewer threads than asked for do everything.
void run_on_threads(Job job, void* argument, int threads);
const char* threading();

}  // namespace qcpu
