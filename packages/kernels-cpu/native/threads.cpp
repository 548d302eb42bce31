#include "threads.h"

#if defined(_WIN32)
#include <windows.h>
#else
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace qcpu {
namespace {

#if defined(_WIN32)
void* find(const char* name) {
  for (const char* library : {"libiomp5md.dll", "vcomp140.dll", "libomp140.x86_64.dll"})
    if (HMODULE loaded = GetModuleHandleA(library))
      if (void* found = reinterpret_cast<void*>(GetProcAddress(loaded, name))) return found;
  return nullptr;
}
#else
void* find(const char* name) { return dlsym(RTLD_DEFAULT, name); }
#endif

template <class Function>
Function* find_function(const char* name) {
  return reinterpret_cast<Function*>(find(name));
}

struct Call {
  Job job;
  void* argument;
};

using KmpTask = void(int* global, int* bound, void* data);

// Looked up when this library is loaded, which is after torch, and with it after its runtime.
struct Runtime {
  int (*number)() = find_function<int()>("omp_get_thread_num");
  void (*gomp)(void (*)(void*), void*, unsigned, unsigned) =
      find_function<void(void (*)(void*), void*, unsigned, unsigned)>("GOMP_parallel");
  void (*kmp_fork)(void*, int, KmpTask*, void*) = find_function<void(void*, int, KmpTask*, void*)>("__kmpc_fork_call");
  int (*kmp_global)(void*) = find_function<int(void*)>("__kmpc_global_thread_num");
  void (*kmp_push)(void*, int, int) = find_function<void(void*, int, int)>("__kmpc_push_num_threads");

  bool has_gomp() const { return number && gomp; }
  bool has_kmp() const { return number && kmp_fork && kmp_global && kmp_push; }
};

const Runtime runtime;
bool forked = false;  // a child of fork has none of its parent's threads, and a runtime may wait for them for ever

#if !defined(_WIN32)
const int watched = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

void run_call(void* data) {
  const Call& call = *static_cast<const Call*>(data);
  call.job(call.argument, runtime.number());
}

struct Location {  // where in a source a parallel region begins: nowhere
  int reserved[4] = {0, 2, 0, 0};
  const char* source = ";unknown;unknown;0;0;;";
};

void run_on_kmp(Call& call, int threads) {
  static Location nowhere;
  runtime.kmp_push(&nowhere, runtime.kmp_global(&nowhere), threads);
  runtime.kmp_fork(&nowhere, 1, [](int*, int*, void* data) { run_call(data); }, &call);
}

}  // namespace

void run_on_threads(Job job, void* argument, int threads) {
  Call call{job, argument};
  if (threads <= 1 || forked) return job(argument, 0);
  if (runtime.has_gomp()) return runtime.gomp(run_call, &call, static_cast<unsigned>(threads), 0);
  if (runtime.has_kmp()) return run_on_kmp(call, threads);
  job(argument, 0);
}

const char* threading() { return runtime.has_gomp() ? "gomp" : runtime.has_kmp() ? "kmp" : "none"; }

}  // namespace qcpu
