// The kernel's own threads, run one after another on the CPU. For tests on machines without a GPU.
#include <exception>

#include "masked_fanout.h"

namespace {

using namespace masked_fanout;

// A small grid of threads: most of them have several tiles and chunks, some have none.
constexpr int kGrid[2] = {7, 2};

struct Run {
  const Params &params;
  const Plan &plan;

  template <typename Tile>
  int with() const {
    if (params.variants == 0) return 0;
    const int step = variants_per_tile(params, plan.tiles, 1);
    for (int y = 0; y < kGrid[1]; ++y) {
      for (int x = 0; x < kGrid[0]; ++x) {
        walk<Tile>(params, plan, step, uint32_t(x), uint32_t(kGrid[0]), y, kGrid[1]);
      }
    }
    return 0;
  }
};

}  // namespace

extern "C" {

int masked_fanout_abi() { return MASKED_FANOUT_ABI << 16 | int(sizeof(MaskedFanoutParams)); }

// The stream is there so that both libraries are called in the same way.
int masked_fanout_host(const MaskedFanoutParams *params, void * /*stream*/) {
  Plan plan;
  if (const int refused = make_plan(*params, &plan)) return refused;
  try {
    return dispatch(*params, plan, Run{*params, plan});
  } catch (const std::exception &) {
    return 2;  // a vector was not aligned: a GPU would have trapped
  }
}

// Elements per vector that the launch would use, or -1: lets tests see which path they took.
int masked_fanout_vector(const MaskedFanoutParams *params) {
  Plan plan;
  return make_plan(*params, &plan) ? -1 : plan.vector;
}

// Conversions, for tests that try every value.
float masked_fanout_widen(uint16_t bits, int bfloat16) {
  return bfloat16 ? to_float(BFloat16{bits}) : to_float(Half{bits});
}

uint16_t masked_fanout_narrow(float value, int bfloat16) {
  Half half;
  BFloat16 brain;
  from_float(value, &half);
  from_float(value, &brain);
  return bfloat16 ? brain.bits : half.bits;
}

}  // extern "C"
