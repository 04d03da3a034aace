// Runs a kernel's threads on the host, and stands in for csrc/cuda/common.cu.
//
// A thread is a fiber only where it waits: a fiber starts threads one after another for as long as they finish without
// waiting, and is set aside at a barrier or shuffle. Blocks, and the threads between two barriers, run in a random order.
#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include <ucontext.h>

#include "../cpu/ema_scale_update.h"
#include "../cuda/common.cuh"
#include "../cuda/ema_scale_update.h"
#include "../cuda/reduce.cuh"

namespace manpp::emulation {

Index thread_index;
Index block_index;
Index grid_size;
unsigned long long stream_number = 0;
unsigned long long capture_number = 0;

namespace {

constexpr size_t kStack = 128 * 1024;
constexpr uint32_t kWarp = 32;

enum class State { Running, AtBlockBarrier, AtWarpBarrier, Done };

using Place = void*[5]; // where to go on, for the compiler's own setjmp: ucontext's switch is a system call

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStack]};
  Place place;
  bool begun = false;
  uint32_t thread = 0; // the one it runs
};

struct Machine {
  std::mt19937 random{[] {
    const char* seed = std::getenv("MANPP_EMULATION_SEED");
    return seed == nullptr ? 0u : static_cast<uint32_t>(std::atol(seed));
  }()};
  Place scheduler;
  std::vector<std::unique_ptr<Fiber>> fibers;
  const std::function<void()>* body = nullptr;
  std::vector<uint32_t> order; // of the threads' starts
  size_t started = 0;
  std::vector<State> states;
  std::vector<uint32_t> fiber_of; // the thread's, where it waits
  std::vector<uint64_t> mail; // [parity][thread]
  std::vector<uint8_t> shuffles; // how many a thread has been through, modulo 2
  uint32_t current = 0;
};

Machine machine;

[[noreturn]] void fail(const std::string& what) {
  throw std::runtime_error("manpp_kernels, emulated: " + what);
}

// In a function of its own: the compiler may not see both ends of a jump at once.
__attribute__((noipa, no_sanitize("address"))) void leap(Place& there) {
  __builtin_longjmp(there, 1);
}

__attribute__((noipa, no_sanitize("address"))) void switch_to(Place& here, Place& there) {
  if (__builtin_setjmp(here) == 0) {
    leap(there);
  }
}

void run_fiber() {
  Machine& m = machine;
  for (;;) {
    uint32_t fiber = m.current;
    while (m.started < m.order.size()) {
      uint32_t thread = m.order[m.started++];
      m.fibers[fiber]->thread = thread;
      thread_index.x = thread;
      (*m.body)();
      m.states[thread] = State::Done;
    }
    switch_to(m.fibers[fiber]->place, m.scheduler);
  }
}

__attribute__((noipa, no_sanitize("address"))) void begin(Fiber& f) {
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = f.stack.get();
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, run_fiber, 0);
  f.begun = true;
  if (__builtin_setjmp(machine.scheduler) == 0) {
    setcontext(&context);
  }
}

void resume(uint32_t fiber) {
  Machine& m = machine;
  Fiber& f = *m.fibers[fiber];
  m.current = fiber;
  thread_index.x = f.thread;
  if (f.begun) {
    switch_to(m.scheduler, f.place);
  } else {
    begin(f);
  }
}

void wait(State reason) {
  Machine& m = machine;
  uint32_t thread = thread_index.x;
  m.states[thread] = reason;
  m.fiber_of[thread] = m.current;
  switch_to(m.fibers[m.current]->place, m.scheduler);
}

// Those that may go on: a warp that is complete, or the block.
std::vector<uint32_t> released() {
  Machine& m = machine;
  std::vector<uint32_t> threads;
  uint32_t count = static_cast<uint32_t>(m.states.size());
  for (uint32_t warp = 0; warp < count; warp += kWarp) {
    auto begin = m.states.begin() + warp;
    if (std::all_of(begin, begin + kWarp, [](State s) { return s == State::AtWarpBarrier; })) {
      for (uint32_t i = 0; i < kWarp; ++i) {
        threads.push_back(warp + i);
      }
    }
  }
  if (threads.empty() &&
      std::all_of(m.states.begin(), m.states.end(), [](State s) { return s == State::AtBlockBarrier; })) {
    threads.resize(count);
    std::iota(threads.begin(), threads.end(), 0);
  }
  return threads;
}

void run_block(uint32_t threads) {
  Machine& m = machine;
  m.order.resize(threads);
  std::iota(m.order.begin(), m.order.end(), 0);
  std::shuffle(m.order.begin(), m.order.end(), m.random);
  m.started = 0;
  m.states.assign(threads, State::Running);
  m.fiber_of.assign(threads, 0);
  m.mail.assign(2 * threads, 0);
  m.shuffles.assign(threads, 0);
  for (uint32_t fiber = 0; m.started < threads; ++fiber) {
    if (fiber == m.fibers.size()) {
      m.fibers.push_back(std::make_unique<Fiber>());
    }
    resume(fiber);
  }
  while (std::any_of(m.states.begin(), m.states.end(), [](State s) { return s != State::Done; })) {
    std::vector<uint32_t> ready = released();
    if (ready.empty()) {
      m.fibers.clear(); // they never come back
      fail("some threads wait at a barrier or a shuffle that others of their block or warp never reach");
    }
    std::shuffle(ready.begin(), ready.end(), m.random);
    for (uint32_t thread : ready) {
      m.states[thread] = State::Running;
      resume(m.fiber_of[thread]);
    }
  }
}

} // namespace

void launch(dim3 grid, uint32_t threads, const std::function<void()>& thread) {
  static std::mutex mutex;
  std::lock_guard<std::mutex> lock(mutex);
  if (grid.x == 0 || grid.x > 0x7FFFFFFF || grid.y == 0 || grid.y > 65535 || grid.z != 1 || threads % kWarp != 0) {
    fail("a grid that no GPU launches");
  }
  machine.body = &thread;
  grid_size = {grid.x, grid.y, grid.z};
  std::vector<uint64_t> blocks(static_cast<uint64_t>(grid.x) * grid.y);
  std::iota(blocks.begin(), blocks.end(), 0);
  std::shuffle(blocks.begin(), blocks.end(), machine.random);
  for (uint64_t block : blocks) {
    block_index = {static_cast<uint32_t>(block % grid.x), static_cast<uint32_t>(block / grid.x), 0};
    run_block(threads);
  }
}

void block_barrier() {
  wait(State::AtBlockBarrier);
}

void warp_barrier() {
  machine.shuffles[thread_index.x] ^= 1;
  wait(State::AtWarpBarrier);
}

uint64_t& mailbox(uint32_t lane) {
  Machine& m = machine;
  uint32_t warp = thread_index.x / kWarp * kWarp;
  return m.mail[m.shuffles[thread_index.x] * m.states.size() + warp + lane];
}

} // namespace manpp::emulation

namespace manpp::cuda {

DeviceGuard::DeviceGuard(int) {}
DeviceGuard::~DeviceGuard() {}

cudaStream_t current_stream(int) {
  return reinterpret_cast<cudaStream_t>(static_cast<uintptr_t>(emulation::stream_number));
}

// The stream that the test says is the current one, and what is being captured from it (0: nothing). Nothing is
// recorded, everything runs at once.
extern "C" __attribute__((visibility("default"))) void manpp_emulate_stream(uint64_t stream, uint64_t capture) {
  emulation::stream_number = stream;
  emulation::capture_number = capture;
}

bool is_capturing(cudaStream_t) {
  return emulation::capture_number != 0;
}

void wait_for(cudaStream_t) {
  STD_TORCH_CHECK(
      emulation::capture_number == 0, "manpp_kernels, emulated: a stream that is being captured cannot be waited for");
}

static std::vector<std::string> launched;

void check_launch(const char* kernel) {
  launched.push_back(kernel);
}

// The names of what was launched since the last call, joined by commas; valid until the next.
extern "C" __attribute__((visibility("default"))) const char* manpp_emulated_launches() {
  static std::string names;
  names.clear();
  for (const std::string& name : launched) {
    names += names.empty() ? name : "," + name;
  }
  launched.clear();
  return names.c_str();
}

// The address of the `count` counters that a launch would get now, and how many of them are at zero; 0 where they would
// be of that launch alone.
extern "C" __attribute__((visibility("default"))) uint64_t manpp_emulated_counters(uint32_t count, uint32_t* zeros) {
  const int64_t none = 0;
  Arrivals found = arrivals(torch::stable::empty({&none, 1}), current_stream(0), count);
  *zeros = static_cast<uint32_t>(std::count(found.counters, found.counters + count, 0u));
  return found.own.defined() ? 0 : reinterpret_cast<uint64_t>(found.counters);
}

// All bits set: NaN as a floating-point number, so that a share nobody wrote shows.
Tensor scratch(const Tensor& like, int64_t bytes) {
  int64_t words = (bytes + 7) / 8;
  Tensor buffer = torch::stable::new_empty(like, {&words, 1}, torch::headeronly::ScalarType::Long);
  if (words > 0) {
    std::memset(buffer.data_ptr(), 0xFF, static_cast<size_t>(words) * 8);
  }
  return buffer;
}

} // namespace manpp::cuda

// What csrc asks of the CPU's kernels, outside csrc/cpu: here the emulated GPU serves it.
namespace manpp::cpu {

static std::map<const EmaLaunch*, cuda::EmaLaunch>& launches() {
  static auto* all = new std::map<const EmaLaunch*, cuda::EmaLaunch>();
  return *all;
}

EmaLaunch::EmaLaunch(std::vector<Entry> e) : entries(std::move(e)) {
  const int64_t none = 0;
  launches().insert_or_assign(this, cuda::EmaLaunch(entries, torch::stable::empty({&none, 1})));
}

void EmaLaunch::run(const Scalars& scalars) const {
  launches().at(this).run(scalars);
}

} // namespace manpp::cpu
