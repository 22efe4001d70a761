// The tiles of masked_fanout.h on a GPU, behind a plain C interface: no torch headers, so one
// library serves every version of torch.
#include <cuda_runtime.h>

#include "masked_fanout.h"

namespace {

using namespace masked_fanout;

constexpr int kThreads = 256;
constexpr int kBlocksAtOnce = 2;  // per multiprocessor: 128 registers a thread, which is enough

// x runs over the tiles of one variant, y over chunks of variants.
template <typename Tile>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce)
    fanout_kernel(const __grid_constant__ Params params, const __grid_constant__ Plan plan,
                  const int variants_per_tile) {
  walk<Tile>(params, plan, variants_per_tile, blockIdx.x * kThreads + threadIdx.x,
             gridDim.x * kThreads, int(blockIdx.y), int(gridDim.y));
}

struct Launch {
  const Params &params;
  const Plan &plan;
  cudaStream_t stream;

  template <typename Tile>
  int with() const {
    int device = 0, multiprocessors = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return error;

    const int64_t blocks = (int64_t(plan.tiles) + kThreads - 1) / kThreads;
    // Eight rounds of blocks on every multiprocessor: the last, partly empty one is then a small
    // part of the whole.
    int step = variants_per_tile(params, blocks, 8 * kBlocksAtOnce * int64_t(multiprocessors));
    const int chunks = (params.variants - 1) / step + 1;
    constexpr int kMostChunks = 65535;  // of gridDim.y
    const dim3 grid(unsigned(blocks), unsigned(chunks < kMostChunks ? chunks : kMostChunks));
    void *arguments[] = {const_cast<Params *>(&params), const_cast<Plan *>(&plan), &step};
    error = cudaLaunchKernel(reinterpret_cast<const void *>(fanout_kernel<Tile>), grid,
                             dim3(kThreads), arguments, 0, stream);
    if (error != cudaSuccess) cudaGetLastError();  // reported here, so not again by others
    return error;
  }
};

}  // namespace

extern "C" {

int masked_fanout_abi() { return MASKED_FANOUT_ABI << 16 | int(sizeof(MaskedFanoutParams)); }

// Whether this library holds code for the current device and the driver can run it.
int masked_fanout_ready() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(
      &attributes, reinterpret_cast<const void *>(fanout_kernel<Tile<float, false, true, 1>>));
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

const char *masked_fanout_error(int code) { return cudaGetErrorString(cudaError_t(code)); }

// All pointers are of the current device. Returns a cudaError; the work itself is asynchronous.
int masked_fanout_launch(const MaskedFanoutParams *params, void *stream) {
  Plan plan;
  if (const int refused = make_plan(*params, &plan)) return refused;
  if (params->variants == 0 || plan.tiles == 0) return cudaSuccess;
  return dispatch(*params, plan, Launch{*params, plan, static_cast<cudaStream_t>(stream)});
}

}  // extern "C"
