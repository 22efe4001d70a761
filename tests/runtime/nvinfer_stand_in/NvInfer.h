// STAND-IN, not NVIDIA's: see README.md. Declares what cswap_run.cpp uses of TensorRT 10.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda_runtime_api.h"

#define NV_TENSORRT_MAJOR 10

extern "C" std::int32_t getInferLibMajorVersion() noexcept;
extern "C" std::int32_t getInferLibMinorVersion() noexcept;
extern "C" std::int32_t getInferLibPatchVersion() noexcept;
extern "C" std::int32_t getInferLibBuildVersion() noexcept;

namespace nvinfer1 {

enum class DataType : std::int32_t { kFLOAT = 0, kHALF = 1 };
enum class TensorIOMode : std::int32_t { kNONE = 0, kINPUT = 1, kOUTPUT = 2 };
enum class OptProfileSelector : std::int32_t { kMIN = 0, kOPT = 1, kMAX = 2 };

struct Dims {
  std::int32_t nbDims;
  std::int64_t d[8];
};

class ILogger {
public:
  enum class Severity : std::int32_t {
    kINTERNAL_ERROR = 0,
    kERROR = 1,
    kWARNING = 2,
    kINFO = 3,
    kVERBOSE = 4
  };
  virtual void log(Severity severity, const char *words) noexcept = 0;
  virtual ~ILogger() = default;
};

class IExecutionContext {
public:
  virtual ~IExecutionContext() noexcept = default;
  virtual bool setInputShape(const char *name, const Dims &shape) noexcept = 0;
  virtual bool setTensorAddress(const char *name, void *data) noexcept = 0;
  virtual bool enqueueV3(cudaStream_t stream) noexcept = 0;
};

class ICudaEngine {
public:
  virtual ~ICudaEngine() noexcept = default;
  virtual std::int32_t getNbIOTensors() const noexcept = 0;
  virtual const char *getIOTensorName(std::int32_t index) const noexcept = 0;
  virtual TensorIOMode getTensorIOMode(const char *name) const noexcept = 0;
  virtual DataType getTensorDataType(const char *name) const noexcept = 0;
  virtual Dims getTensorShape(const char *name) const noexcept = 0;
  virtual Dims getProfileShape(const char *name, std::int32_t profile,
                               OptProfileSelector select) const noexcept = 0;
  virtual IExecutionContext *createExecutionContext() noexcept = 0;
};

class IRuntime {
public:
  virtual ~IRuntime() noexcept = default;
  virtual ICudaEngine *deserializeCudaEngine(const void *blob, std::size_t size) noexcept = 0;
};

IRuntime *createInferRuntime(ILogger &logger) noexcept;

} // namespace nvinfer1
