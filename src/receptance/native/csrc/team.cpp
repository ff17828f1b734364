// The team of threads: see core.h.
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "core.h"

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
static inline void relax() { _mm_pause(); }
#elif defined(__aarch64__)
static inline void relax() { asm volatile("yield"); }
#else
static inline void relax() {}
#endif

namespace receptance {

constexpr int SPINS = 300;      // about 10 microseconds, then
constexpr int YIELDS = 200;     // give the core away, and between calls fall asleep at last

struct Team {
  int size;
  std::vector<std::thread> threads;

  std::atomic<int> arrived{0};
  std::atomic<unsigned> round{0};
  std::atomic<int64_t> tickets{0};

  std::atomic<unsigned> job{0};
  std::atomic<bool> stop{false};
  void (*work)(void*, int) = nullptr;
  void* context = nullptr;
  std::mutex mutex;
  std::condition_variable wake;
  std::atomic<int> sleeping{0};

  void serve(int thread) {
    for (unsigned done = 0;; done++) {
      for (int i = 0; job.load(std::memory_order_acquire) == done && i < SPINS + YIELDS; i++) {
        if (i < SPINS) relax(); else std::this_thread::yield();
      }
      if (job.load(std::memory_order_acquire) == done) {
        std::unique_lock<std::mutex> lock(mutex);
        sleeping++;
        wake.wait(lock, [&] { return job.load() != done; });
        sleeping--;
      }
      if (stop) return;
      work(context, thread);
      team_barrier(this);
    }
  }
};

Team* team_new(int threads) {
  Team* team = new Team;
  team->size = threads < 1 ? 1 : threads;
  try {
    for (int i = 1; i < team->size; i++) team->threads.emplace_back([team, i] { team->serve(i); });
  } catch (...) {  // the system starts no more
    team_free(team);
    return nullptr;
  }
  return team;
}

static void start(Team* team) {
  {
    std::lock_guard<std::mutex> lock(team->mutex);
    team->job.fetch_add(1);
  }
  if (team->sleeping.load() > 0) team->wake.notify_all();
}

void team_free(Team* team) {
  team->stop = true;
  start(team);
  for (auto& thread : team->threads) thread.join();
  delete team;
}

int team_size(const Team* team) { return team->size; }

void team_run(Team* team, void (*work)(void*, int), void* context) {
  team->work = work;
  team->context = context;
  team->tickets.store(0, std::memory_order_relaxed);
  if (team->size > 1) start(team);
  work(context, 0);
  team_barrier(team);
}

void team_barrier(Team* team) {
  if (team->size == 1) {
    team->tickets.store(0, std::memory_order_relaxed);
    return;
  }
  unsigned round = team->round.load(std::memory_order_acquire);
  if (team->arrived.fetch_add(1, std::memory_order_acq_rel) == team->size - 1) {
    team->arrived.store(0, std::memory_order_relaxed);
    team->tickets.store(0, std::memory_order_relaxed);
    team->round.store(round + 1, std::memory_order_release);
    return;
  }
  for (int i = 0; team->round.load(std::memory_order_acquire) == round; i++) {
    if (i < SPINS) relax(); else std::this_thread::yield();
  }
}

int64_t team_next(Team* team) {
  if (team->size == 1) {
    int64_t ticket = team->tickets.load(std::memory_order_relaxed);
    team->tickets.store(ticket + 1, std::memory_order_relaxed);
    return ticket;
  }
  return team->tickets.fetch_add(1, std::memory_order_relaxed);
}

}  // namespace receptance
