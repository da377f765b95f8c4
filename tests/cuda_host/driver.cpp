// driver.cpp -- runs cases of the CUDA operator on the host shim.
//
// driver SEED [PLACE] <cases >results. PLACE: the barrier or bounds check to leave out.
// A case is 64 numbers of 64 bits (enum field), then the arrays (enum array), each as a length in
// bytes (-1: absent) and its content; a result is the arrays of enum result in the same form.
// Every array is copied to memory of exactly its size, so that the sanitizers see each access
// beyond it.
#include <sanitizer/asan_interface.h>
#include <sys/mman.h>

#include <vector>

#include "cuda_runtime.h"
#include "wce_cuda.h"

namespace {

enum field {
  DTYPE, OUTER, CLASSES, INNER, X_OUTER, X_CLASS, X_INNER, X_AT,
  PROB_DTYPE, PROB_OUTER, PROB_CLASS, PROB_INNER, PROB_AT,
  DX_OUTER, DX_CLASS, DX_INNER, DX_AT, DX_BYTES,
  IGNORE, SKIP_EMPTY, REDUCTION, EMPTY_ZERO, LOSS_DTYPE, OUTPUTS, CHECK,
  GRAD_DTYPE, GRAD_STRIDE, SAVED, HAS_DENOMINATOR, MIX_STRIDE,
  REGIME, THREADS, LANES, TILE, COLUMNS, BLOCKS,
  FAR_OUTER, FAR_CLASS, FAR_INNER,  // added to the strides of logits, probabilities and gradient
  SPIKE, FLOOR, SOFT, FIELDS = 64
};
enum array {
  X, TARGET, TARGET2, MIX, PROB, WEIGHT, PRIOR, SAMPLE_WEIGHT, MASK, NORMALIZER,
  GRAD, GRAD_LSE, GRAD_LOG_PROB, ARRAYS
};
// Bits of OUTPUTS.
enum { ROW_LOSS = 1, STATISTICS = 2, ROW_RESULTS = 4, ENTROPIES = 8, BACKWARD = 16 };

// Memory for n bytes whose last byte is the last one that may be touched. skew: bytes by which it
// misses a 16-byte boundary.
struct buffer {
  unsigned char *base = nullptr, *data = nullptr;
  size_t bytes = 0;

  void allocate(size_t n, size_t skew = 0) {
    bytes = n;
    void *memory = nullptr;
    if (posix_memalign(&memory, 16, n + skew ? n + skew : 1)) abort();
    base = static_cast<unsigned char *>(memory);
    data = base + skew;
    memset(base, 0xff, n + skew);
    if (skew) ASAN_POISON_MEMORY_REGION(base, skew / 8 * 8);
  }
  ~buffer() {
    if (base && data != base) ASAN_UNPOISON_MEMORY_REGION(base, data - base);
    free(base);
  }
};

bool read_exactly(void *to, size_t bytes) { return fread(to, 1, bytes, stdin) == bytes; }

void read_array(buffer &b, size_t skew) {
  int64_t n;
  if (!read_exactly(&n, sizeof n)) abort();
  if (n < 0) return;
  b.allocate(static_cast<size_t>(n), skew);
  if (!read_exactly(b.data, b.bytes)) abort();
}

void write_array(const buffer &b) {
  const int64_t n = b.data ? static_cast<int64_t>(b.bytes) : -1;
  fwrite(&n, sizeof n, 1, stdout);
  if (n > 0) fwrite(b.data, 1, b.bytes, stdout);
}

double as_double(int64_t bits) {
  double x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

void must(const wce_cuda_status &status) {
  if (status.code == 0) return;
  fprintf(stderr, "%s: %s\n", status.kernel, status.text);
  exit(4);
}

size_t size_of(int64_t dtype) { return dtype == WCE_F64 ? 8 : dtype == WCE_F32 ? 4 : 2; }

// The elements of a tensor copied to where larger strides put them, and back. In between lies
// address space without memory.
struct spread_memory {
  unsigned char *data = nullptr;
  size_t bytes = 0;

  void map(size_t n) {
    bytes = n;
    void *memory = mmap(nullptr, n, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) abort();
    data = static_cast<unsigned char *>(memory);
  }
  ~spread_memory() {
    if (data) munmap(data, bytes);
  }
};

struct test_case {
  int64_t f[FIELDS];
  buffer in[ARRAYS];
  spread_memory spread[3];  // logits, probabilities, gradient
  wce_problem p = {};
  size_t acc = 4, rows = 0;

  bool is_far() const { return f[FAR_OUTER] || f[FAR_CLASS] || f[FAR_INNER]; }

  // Calls move(element of the dense tensor, element of the spread one) for each of them.
  template <class Move>
  void for_each_element(const wce_view &dense, Move move) const {
    for (int64_t o = 0; o < p.outer; ++o)
      for (int64_t c = 0; c < p.classes; ++c)
        for (int64_t i = 0; i < p.inner; ++i) {
          const int64_t from =
              o * dense.stride_outer + c * dense.stride_class + i * dense.stride_inner;
          move(from, from + o * f[FAR_OUTER] + c * f[FAR_CLASS] + i * f[FAR_INNER]);
        }
  }

  // The view with the larger strides, in memory of its own that holds what `view` holds.
  wce_view spread_out(const wce_view &view, spread_memory &to, size_t size) const {
    if (!is_far() || !view.data) return view;
    int64_t last = 0;
    for_each_element(view, [&](int64_t, int64_t at) { last = at > last ? at : last; });
    to.map((last + 1) * size);
    for_each_element(view, [&](int64_t from, int64_t at) {
      memcpy(to.data + at * size, static_cast<const char *>(view.data) + from * size, size);
    });
    return {to.data, view.stride_outer + f[FAR_OUTER], view.stride_class + f[FAR_CLASS],
            view.stride_inner + f[FAR_INNER]};
  }

  bool read() {
    if (!read_exactly(f, sizeof f)) return false;
    const size_t x_size = size_of(f[DTYPE]), prob_size = size_of(f[PROB_DTYPE]);
    size_t skew[ARRAYS] = {};
    skew[X] = f[X_AT] * x_size % 16;
    skew[PROB] = f[PROB_AT] * prob_size % 16;
    for (int k = 0; k < ARRAYS; ++k) read_array(in[k], skew[k]);
    acc = f[DTYPE] == WCE_F64 ? 8 : 4;
    rows = static_cast<size_t>(f[OUTER] * f[INNER]);
    p.dtype = static_cast<wce_dtype>(f[DTYPE]);
    p.outer = f[OUTER];
    p.classes = f[CLASSES];
    p.inner = f[INNER];
    p.logits = spread_out({in[X].data, f[X_OUTER], f[X_CLASS], f[X_INNER]}, spread[0], x_size);
    p.target = reinterpret_cast<const int64_t *>(in[TARGET].data);
    p.target2 = reinterpret_cast<const int64_t *>(in[TARGET2].data);
    p.mix = in[MIX].data;
    p.mix_stride = f[MIX_STRIDE];
    p.prob = spread_out({in[PROB].data, f[PROB_OUTER], f[PROB_CLASS], f[PROB_INNER]}, spread[1],
                        prob_size);
    p.prob_dtype = static_cast<wce_dtype>(f[PROB_DTYPE]);
    p.weight = in[WEIGHT].data;
    p.prior = in[PRIOR].data;
    p.sample_weight = in[SAMPLE_WEIGHT].data;
    p.mask = in[MASK].data;
    p.spike = as_double(f[SPIKE]);
    p.floor = as_double(f[FLOOR]);
    p.soft = as_double(f[SOFT]);
    p.ignore_index = f[IGNORE];
    p.skip_empty = static_cast<int32_t>(f[SKIP_EMPTY]);
    return true;
  }

  // What the test wants in place of the plan's own choice; -1: nothing.
  wce_cuda_plan adapt(wce_cuda_plan plan) const {
    if (f[REGIME] >= 0) plan.regime = static_cast<wce_cuda_regime>(f[REGIME]);
    if (f[THREADS] > 0) plan.threads = static_cast<int32_t>(f[THREADS]);
    if (f[LANES] > 0) plan.lanes = static_cast<int32_t>(f[LANES]);
    if (f[TILE] > 0) plan.tile = f[TILE];
    if (f[COLUMNS] > 0) {
      plan.columns = f[COLUMNS];
      plan.chunks = (p.classes + plan.columns - 1) / plan.columns;
    }
    if (f[BLOCKS] > 0) plan.blocks = f[BLOCKS];
    return plan;
  }

  void run() {
    buffer loss, denominator, denominator2, max, log_sum, coef_sum, row_loss, lse, log_prob, entropy;
    buffer correct, bad, dx;
    const int64_t wants = f[OUTPUTS];
    loss.allocate(size_of(f[LOSS_DTYPE]));
    denominator.allocate(acc);
    if (p.target2) denominator2.allocate(acc);
    if (wants & (STATISTICS | BACKWARD)) {
      max.allocate(rows * acc);
      log_sum.allocate(rows * acc);
      if (p.prob.data) coef_sum.allocate(rows * acc);
    }
    if (wants & ROW_LOSS) row_loss.allocate(rows * size_of(f[LOSS_DTYPE]));
    if (wants & ROW_RESULTS) {
      lse.allocate(rows * acc);
      log_prob.allocate(rows * acc);
      correct.allocate(rows);
    }
    if (wants & ENTROPIES) entropy.allocate(rows * acc);
    if (f[CHECK]) bad.allocate(8);

    const wce_row_outputs out = {max.data,      log_sum.data,  coef_sum.data, row_loss.data,
                                 static_cast<wce_dtype>(f[LOSS_DTYPE]),
                                 lse.data,      log_prob.data, entropy.data, correct.data};
    const wce_cuda_total total = {static_cast<wce_reduction>(f[REDUCTION]),
                                  static_cast<int32_t>(f[EMPTY_ZERO]), in[NORMALIZER].data,
                                  loss.data, static_cast<wce_dtype>(f[LOSS_DTYPE]),
                                  denominator.data, denominator2.data};
    {
      const wce_cuda_plan plan = adapt(wce_cuda_forward_plan(&p));
      buffer workspace;
      workspace.allocate(wce_cuda_forward_workspace(&plan, &p));
      must(wce_cuda_forward(&plan, &p, &out, &total, workspace.data,
                            reinterpret_cast<uint64_t *>(bad.data), nullptr));
    }
    if (wants & BACKWARD) {
      dx.allocate(static_cast<size_t>(f[DX_BYTES]), f[DX_AT] * size_of(f[DTYPE]) % 16);
      wce_row_grads g = {};
      const wce_view dense = {dx.data, f[DX_OUTER], f[DX_CLASS], f[DX_INNER]};
      const size_t size = size_of(f[DTYPE]);
      g.dx = spread_out(dense, spread[2], size);
      if (f[SAVED]) {
        g.max = max.data;
        g.log_sum = log_sum.data;
        g.coef_sum = coef_sum.data;
      }
      g.grad = in[GRAD].data;
      g.grad_dtype = static_cast<wce_dtype>(f[GRAD_DTYPE]);
      g.grad_stride = f[GRAD_STRIDE];
      g.denominator = f[HAS_DENOMINATOR] ? denominator.data : nullptr;
      g.denominator2 = f[HAS_DENOMINATOR] ? denominator2.data : nullptr;
      g.grad_lse = in[GRAD_LSE].data;
      g.grad_log_prob = in[GRAD_LOG_PROB].data;
      const wce_cuda_plan plan = adapt(wce_cuda_backward_plan(&p, &g));
      buffer workspace;
      workspace.allocate(wce_cuda_backward_workspace(&plan, &p, &g));
      must(wce_cuda_backward(&plan, &p, &g, workspace.data,
                             reinterpret_cast<uint64_t *>(bad.data), nullptr));
      if (is_far())
        for_each_element(dense, [&](int64_t to, int64_t from) {
          memcpy(dx.data + to * size, spread[2].data + from * size, size);
        });
    }
    for (const buffer *b : {&loss, &denominator, &max, &log_sum, &row_loss, &lse, &log_prob,
                            &entropy, &correct, &bad, &dx})
      write_array(*b);
  }
};

}  // namespace

int main(int argc, char **argv) {
  shim::seed(argc > 1 ? static_cast<unsigned>(atoi(argv[1])) : 0);
  if (argc > 2) shim::leave_out(argv[2]);
  for (;;) {
    test_case one;
    if (!one.read()) break;
    one.run();
  }
  fflush(stdout);
  return 0;
}
