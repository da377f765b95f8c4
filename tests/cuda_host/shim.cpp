// shim.cpp -- the scheduler behind include/cuda_runtime.h.
#include <ucontext.h>

#include <memory>
#include <random>
#include <vector>

#include "cuda_runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define SWITCH_FROM(save, bottom, size) __sanitizer_start_switch_fiber(save, bottom, size)
#define SWITCHED(saved, bottom, size) __sanitizer_finish_switch_fiber(saved, bottom, size)
#else
#define SWITCH_FROM(save, bottom, size) ((void)0)
#define SWITCHED(saved, bottom, size) ((void)0)
#endif

namespace shim {
namespace {

constexpr size_t stack_bytes = 256 << 10;
constexpr int warp_size = 32;

struct fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[stack_bytes]};
  void *fake_stack = nullptr;
  position at;
  uint64_t turn = 0;  // of the warp's shuffles
  std::vector<std::pair<uint4 *, const uint4 *>> copies;  // (to, from) that are still to come
  bool done = false;
};

struct warp {
  uint64_t slot[2][warp_size];  // two, so that nobody overwrites what a slower thread still reads
  int arrived = 0;
  std::vector<fiber *> ready;
};

struct device {
  std::vector<std::unique_ptr<fiber>> fibers;  // kept from launch to launch
  std::vector<warp> warps;
  size_t ready = 0, favourite = 0;  // threads that could run; the warp that runs first
  fiber *current = nullptr;
  fiber main;  // its stack is not used
  const void *main_bottom = nullptr;
  size_t main_size = 0, threads = 0, at_barrier = 0, done = 0;
  const std::function<void()> *kernel = nullptr;
  unsigned char *shared = nullptr;
  std::mt19937 random;
  std::string left_out;
} dev;

[[noreturn]] void fail(const char *what) {
  fprintf(stderr, "host shim: %s\n", what);
  exit(3);
}

void switch_to(fiber *to, bool ends) {
  fiber *from = dev.current;
  dev.current = to;
  const bool to_main = to == &dev.main;
  (void)to_main;
  SWITCH_FROM(ends ? nullptr : &from->fake_stack, to_main ? dev.main_bottom : to->stack.get(),
              to_main ? dev.main_size : stack_bytes);
  swapcontext(&from->context, &to->context);
  SWITCHED(from->fake_stack, nullptr, nullptr);
}

void make_ready(fiber *f) {
  dev.warps[f->at.thread.x / warp_size].ready.push_back(f);
  ++dev.ready;
}

// Goes on with a thread drawn by chance from one warp, which stays in favour until all of its
// threads wait or chance ends it: so it may be a whole round ahead of the others.
void switch_to_next(bool ends) {
  if (dev.ready == 0) {
    if (dev.done != dev.threads) fail("some threads wait at a barrier that others never reach");
    switch_to(&dev.main, ends);
    return;
  }
  if (dev.random() % 256 == 0) dev.favourite = dev.random() % dev.warps.size();
  while (dev.warps[dev.favourite].ready.empty())
    dev.favourite = dev.random() % dev.warps.size();
  std::vector<fiber *> &ready = dev.warps[dev.favourite].ready;
  const size_t k = dev.random() % ready.size();
  fiber *next = ready[k];
  ready[k] = ready.back();
  ready.pop_back();
  --dev.ready;
  if (next != dev.current) switch_to(next, ends);
}

void body() {
#if defined(__SANITIZE_ADDRESS__)
  const void *bottom;
  size_t size;
  SWITCHED(nullptr, &bottom, &size);
  if (!dev.main_bottom) {
    dev.main_bottom = bottom;
    dev.main_size = size;
  }
#endif
  (*dev.kernel)();
  dev.current->done = true;
  ++dev.done;
  switch_to_next(true);
}

void run_block(dim3 block, dim3 block_size, dim3 grid, size_t shared_bytes) {
  // Exactly so many bytes, so that the sanitizer sees what lies beyond; nan until written.
  void *memory = nullptr;
  if (posix_memalign(&memory, 16, shared_bytes ? shared_bytes : 1)) fail("out of memory");
  memset(memory, 0xff, shared_bytes);
  dev.shared = static_cast<unsigned char *>(memory);
  dev.threads = block_size.x;
  dev.at_barrier = dev.done = dev.ready = dev.favourite = 0;
  dev.warps.assign(dev.threads / warp_size, warp());
  while (dev.fibers.size() < dev.threads) dev.fibers.emplace_back(new fiber);
  for (unsigned t = 0; t < dev.threads; ++t) {
    fiber *f = dev.fibers[t].get();
    f->at = {dim3{t, 0, 0}, block, block_size, grid};
    f->turn = 0;
    f->copies.clear();
    f->done = false;
    f->fake_stack = nullptr;
    getcontext(&f->context);
    f->context.uc_stack.ss_sp = f->stack.get();
    f->context.uc_stack.ss_size = stack_bytes;
    f->context.uc_link = nullptr;
    makecontext(&f->context, body, 0);
    make_ready(f);
  }
  dev.current = &dev.main;
  switch_to_next(false);
  free(memory);
}

}  // namespace

const position &now() { return dev.current->at; }
void seed(unsigned value) { dev.random.seed(value); }
void leave_out(const char *place) { dev.left_out = place; }
bool is_left_out(const char *place) { return dev.left_out == place; }
unsigned char *shared() { return dev.shared; }

void run(int64_t blocks, int64_t threads, size_t shared_bytes,
         const std::function<void()> &kernel) {
  if (threads < 1 || threads > 1024 || threads % warp_size) fail("bad block size");
  if (blocks < 1) fail("no blocks");
  if (shared_bytes > 48 << 10) fail("more than 48 KiB of shared memory");
  dev.kernel = &kernel;
  const dim3 grid{static_cast<unsigned>(blocks), 1, 1};
  const dim3 size{static_cast<unsigned>(threads), 1, 1};
  for (unsigned b = 0; b < grid.x; ++b) run_block(dim3{b, 0, 0}, size, grid, shared_bytes);
}

void block_barrier() {
  if (++dev.at_barrier < dev.threads) {
    switch_to_next(false);
    return;
  }
  dev.at_barrier = 0;  // the last one to come lets all others go on
  for (size_t t = 0; t < dev.threads; ++t)
    if (dev.fibers[t].get() != dev.current) make_ready(dev.fibers[t].get());
  make_ready(dev.current);
  switch_to_next(false);
}

void copy16(void *to, const void *from) {
  fiber *me = dev.current;
  me->copies.emplace_back(static_cast<uint4 *>(to), static_cast<const uint4 *>(from));
  if (dev.random() % 2) wait_for_copies();
}

void wait_for_copies() {
  for (const auto &[to, from] : dev.current->copies) *to = *from;
  dev.current->copies.clear();
}

uint64_t exchange(uint64_t mine, int lane) {
  fiber *me = dev.current;
  const unsigned t = me->at.thread.x, first = t / warp_size * warp_size;
  warp &w = dev.warps[t / warp_size];
  uint64_t *slot = w.slot[me->turn++ % 2];
  slot[t - first] = mine;
  if (++w.arrived == warp_size) {
    w.arrived = 0;
    for (unsigned k = 0; k < warp_size; ++k)
      make_ready(dev.fibers[first + k].get());
  }
  switch_to_next(false);
  return slot[lane];
}

}  // namespace shim
