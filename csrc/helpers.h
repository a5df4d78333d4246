// Work that several threads share: those of the OpenMP that PyTorch has brought into the process,
// or threads of our own.
//
// OpenMP's threads wait for the next work awake for some milliseconds, on the cores that threads of
// our own would need: in a training step these would start late and hold up PyTorch's. A team of
// another size than PyTorch's would make OpenMP end threads and start them again.
//
// Threads of our own sleep in between. They outlive a call, since starting a thread takes longer
// than waking one. The caller never waits for one that has not started; waking a sleeping core can
// take 50 us. They run on the cores that the thread of the first call may use.

#pragma once

#include <atomic>
#include <condition_variable>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>

#if defined(_WIN32)
#include <process.h>
#define VI_PROCESS_ID _getpid
#else
#include <dlfcn.h>
#include <unistd.h>
#define VI_PROCESS_ID getpid
#endif

namespace vi_simsiam {

class Helpers {
 public:
  // Those of this process: a forked child has its parent's memory, but none of its threads. Never
  // destroyed, as the sleepers may not be waited for while a process ends.
  static Helpers& of_this_process() {
    static std::atomic<Helpers*> helpers{nullptr};
    Helpers* found = helpers.load(std::memory_order_acquire);
    if (found == nullptr || found->process_ != VI_PROCESS_ID()) {
      Helpers* made = new Helpers;
      if (helpers.compare_exchange_strong(found, made)) return *made;
      delete made;
    }
    return *found;
  }

  // Calls work here and at the same time in up to `count` helpers; returns when all calls that
  // began have ended. The work must share itself out, and throw nothing.
  void run(int count, const std::function<void()>& work) {
    std::unique_lock<std::mutex> caller(callers_, std::try_to_lock);
    if (count <= 0 || !caller.owns_lock()) return work();  // another thread's work has the helpers
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      try {
        for (; started_ < count; ++started_) std::thread([this] { help(); }).detach();
      } catch (const std::exception&) {
        // No more threads to be had: those there are and this one share the work.
      }
      work_ = &work;
      wanted_ = count < started_ ? count : started_;
    }
    for (int i = 0; i < count; ++i) wake_.notify_one();
    work();
    std::unique_lock<std::mutex> lock(mutex_);
    wanted_ = 0;
    done_.wait(lock, [this] { return active_ == 0; });
  }

 private:
  Helpers() : process_(VI_PROCESS_ID()) {}

  void help() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return wanted_ > 0; });
      --wanted_;
      ++active_;
      const std::function<void()>& work = *work_;
      lock.unlock();
      work();
      lock.lock();
      if (--active_ == 0) done_.notify_one();
    }
  }

  const int process_;
  std::mutex callers_, mutex_;
  std::condition_variable wake_, done_;
  const std::function<void()>* work_ = nullptr;
  int started_ = 0, wanted_ = 0, active_ = 0;
};

#if !defined(_WIN32)
// The entry that compilers call for a parallel region, or nullptr: without OpenMP, or in a child that
// was forked after this was loaded, which has none of its parent's threads.
using OpenMP = void (*)(void (*)(void*), void*, unsigned, unsigned);
inline const auto loading_process = VI_PROCESS_ID();
inline OpenMP openmp() {
  static const auto found = reinterpret_cast<OpenMP>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return loading_process == VI_PROCESS_ID() ? found : nullptr;
}
#endif

// Calls work at the same time in `threads` threads, PyTorch's number, or in no more than are
// useful; returns when all calls have ended. The work must share itself out, and throw nothing.
inline void share_out(int threads, int useful, const std::function<void()>& work) {
  if (threads < 2 || useful < 2) return work();
#if !defined(_WIN32)
  if (const OpenMP parallel = openmp()) {
    const auto call = [](void* each) { (*static_cast<const std::function<void()>*>(each))(); };
    return parallel(call, const_cast<std::function<void()>*>(&work), unsigned(threads), 0);
  }
#endif
  Helpers::of_this_process().run(useful - 1, work);
}

}  // namespace vi_simsiam
