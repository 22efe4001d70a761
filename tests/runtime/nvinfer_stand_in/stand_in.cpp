// STAND-IN for libnvinfer and libcudart, on the CPU: see README.md.

#include "NvInfer.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <sstream>
#include <string>
#include <vector>

namespace {

std::string setting(const char *name, const char *otherwise) {
  const char *value = std::getenv(name);
  return value != nullptr ? value : otherwise;
}

void note(const std::string &line) {
  if (FILE *file = std::fopen(setting("STAND_IN_LOG", "/dev/null").c_str(), "a")) {
    std::fprintf(file, "%s\n", line.c_str());
    std::fclose(file);
  }
}

struct Living { // how many objects were made and not yet released
  int count = 0;
  ~Living() { note("never released: " + std::to_string(count)); }
} living;

struct Counted {
  Counted() { ++living.count; }
  Counted(const Counted &) = delete;
  ~Counted() { --living.count; }
};

using Work = std::vector<std::function<void()>>;

cudaError_t allocate(void **memory, std::size_t size) {
  *memory = std::malloc(size);
  std::memset(*memory, 0xff, size); // NaNs
  ++living.count;
  return cudaSuccess;
}

cudaError_t release(void *memory) {
  std::free(memory);
  --living.count;
  return cudaSuccess;
}

int versionPart(int index) {
  std::stringstream text(setting("STAND_IN_VERSION", "10.14.1.48"));
  std::string part;
  for (int i = 0; i <= index; ++i)
    std::getline(text, part, '.');
  return std::atoi(part.c_str());
}

} // namespace

struct CUgraph_st : Counted {
  Work work;
};

struct CUgraphExec_st : Counted {
  Work work;
};

struct CUstream_st : Counted {
  Work waiting;
  CUgraph_st *capturing = nullptr;
  void add(std::function<void()> step) {
    (capturing != nullptr ? capturing->work : waiting).push_back(std::move(step));
  }
};

extern "C" {

cudaError_t cudaGetDeviceCount(int *count) {
  *count = std::atoi(setting("STAND_IN_DEVICES", "1").c_str());
  return *count > 0 ? cudaSuccess : cudaErrorNoDevice;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int) {
  std::snprintf(properties->name, sizeof properties->name, "%s",
                setting("STAND_IN_GPU", "Stand-in GPU").c_str());
  return cudaSuccess;
}

const char *cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorNoDevice ? "no CUDA-capable device is detected" : "stand-in error";
}

cudaError_t cudaMalloc(void **memory, std::size_t size) { return allocate(memory, size); }
cudaError_t cudaFree(void *memory) { return release(memory); }
cudaError_t cudaMallocHost(void **memory, std::size_t size) { return allocate(memory, size); }
cudaError_t cudaFreeHost(void *memory) { return release(memory); }

cudaError_t cudaMemcpyAsync(void *to, const void *from, std::size_t size, cudaMemcpyKind,
                            cudaStream_t stream) {
  stream->add([=] { std::memcpy(to, from, size); });
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned int) {
  *stream = new CUstream_st;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  for (const auto &step : Work(std::move(stream->waiting)))
    step();
  stream->waiting.clear();
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  stream->capturing = new CUgraph_st;
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
  *graph = stream->capturing;
  stream->capturing = nullptr;
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *executable, cudaGraph_t graph,
                                          unsigned long long) {
  *executable = new CUgraphExec_st;
  (*executable)->work = graph->work;
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  note("launch graph");
  stream->waiting.insert(stream->waiting.end(), executable->work.begin(), executable->work.end());
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete executable;
  return cudaSuccess;
}

std::int32_t getInferLibMajorVersion() noexcept { return versionPart(0); }
std::int32_t getInferLibMinorVersion() noexcept { return versionPart(1); }
std::int32_t getInferLibPatchVersion() noexcept { return versionPart(2); }
std::int32_t getInferLibBuildVersion() noexcept { return versionPart(3); }

} // extern "C"

namespace nvinfer1 {
namespace {

struct Network {
  std::int64_t channels, height, width, classes, largest_batch;
  std::int64_t size() const { return channels * height * width; }
};

float weight(std::int64_t row, std::int64_t column) { // of class `row` for number `column`
  return static_cast<float>((31 * row + 7 * column + row * column) % 11 - 5) / 16.0F;
}

void execute(const Network &network, std::int64_t batch, const float *input, float *output) {
  for (std::int64_t n = 0; n < batch; ++n)
    for (std::int64_t k = 0; k < network.classes; ++k) {
      double sum = 0.0;
      for (std::int64_t i = 0; i < network.size(); ++i)
        sum += static_cast<double>(weight(k, i)) * input[n * network.size() + i];
      output[n * network.classes + k] = static_cast<float>(sum);
    }
}

class Context final : public IExecutionContext, Counted {
public:
  explicit Context(const Network &network) : network_(network) {}

  bool setInputShape(const char *name, const Dims &shape) noexcept override {
    batch_ = shape.d[0];
    return std::strcmp(name, "input") == 0 && shape.nbDims == 4 &&
           shape.d[1] == network_.channels && shape.d[2] == network_.height &&
           shape.d[3] == network_.width && batch_ >= 1 && batch_ <= network_.largest_batch;
  }

  bool setTensorAddress(const char *name, void *data) noexcept override {
    const bool is_input = std::strcmp(name, "input") == 0;
    (is_input ? input_ : output_) = static_cast<float *>(data);
    return is_input || std::strcmp(name, "logits") == 0;
  }

  bool enqueueV3(cudaStream_t stream) noexcept override {
    note("enqueue batch " + std::to_string(batch_));
    stream->add([network = network_, batch = batch_, input = input_, output = output_] {
      execute(network, batch, input, output);
    });
    return true;
  }

private:
  Network network_;
  std::int64_t batch_ = 0;
  float *input_ = nullptr, *output_ = nullptr;
};

class Engine final : public ICudaEngine, Counted {
public:
  explicit Engine(const Network &network) : network_(network) {}

  std::int32_t getNbIOTensors() const noexcept override { return 2; }
  const char *getIOTensorName(std::int32_t index) const noexcept override {
    return index == 0 ? "input" : "logits";
  }
  TensorIOMode getTensorIOMode(const char *name) const noexcept override {
    return std::strcmp(name, "input") == 0 ? TensorIOMode::kINPUT : TensorIOMode::kOUTPUT;
  }
  DataType getTensorDataType(const char *) const noexcept override { return DataType::kFLOAT; }
  Dims getTensorShape(const char *name) const noexcept override {
    return std::strcmp(name, "input") == 0 ? input(-1) : Dims{2, {-1, network_.classes}};
  }
  Dims getProfileShape(const char *, std::int32_t,
                       OptProfileSelector select) const noexcept override {
    return input(select == OptProfileSelector::kMAX ? network_.largest_batch : 1);
  }
  IExecutionContext *createExecutionContext() noexcept override { return new Context(network_); }

private:
  Dims input(std::int64_t batch) const {
    return {4, {batch, network_.channels, network_.height, network_.width}};
  }
  Network network_;
};

class Runtime final : public IRuntime, Counted {
public:
  explicit Runtime(ILogger &logger) : logger_(logger) {}

  ICudaEngine *deserializeCudaEngine(const void *blob, std::size_t size) noexcept override {
    note("deserialize " + std::to_string(size) + " bytes");
    std::stringstream text(std::string(static_cast<const char *>(blob), size));
    std::string magic;
    Network n{};
    text >> magic >> n.channels >> n.height >> n.width >> n.classes >> n.largest_batch;
    if (text && magic == "stand-in")
      return new Engine(n);
    logger_.log(ILogger::Severity::kERROR, "this is no stand-in engine");
    return nullptr;
  }

private:
  ILogger &logger_;
};

} // namespace

IRuntime *createInferRuntime(ILogger &logger) noexcept { return new Runtime(logger); }

} // namespace nvinfer1
