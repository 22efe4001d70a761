// Classifies pictures with the TensorRT engine of a cswap-deploy bundle: README.md says how.
//
// One file for TensorRT 10, TensorRT 11 and TensorRT for RTX, which share NvInfer.h. Nothing of the
// bundle reaches TensorRT before its digest and its version are checked: deserialising an engine
// runs native code. Exit codes are those of cswap_deploy/errors.py.

#include <NvInfer.h>
#include <cuda_runtime_api.h>
#include <openssl/evp.h>

#include <algorithm>
#include <cctype>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <filesystem>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <numeric>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

namespace fs = std::filesystem;

#if defined(TRT_MAJOR_RTX) // by the NvInferVersion.h of TensorRT for RTX, and by no other
constexpr char kTarget[] = "tensorrt-rtx";
constexpr bool kPortable = true; // one engine for many GPUs
#elif NV_TENSORRT_MAJOR >= 10
constexpr char kTarget[] = "tensorrt";
constexpr bool kPortable = false;
#else
#error "cswap_run needs TensorRT 10 or later"
#endif

constexpr char kUsage[] =
    "usage: cswap_run BUNDLE INPUT... [--top N] [--repeat N] [--graph]\n"
    "\n"
    "  INPUT        a binary PPM or PGM of the network's size, 8 bits a channel, or an .npy of\n"
    "               normalised float32, (C, H, W) or (N, C, H, W); all inputs are one batch\n"
    "  --top N      classes to print for each input (5)\n"
    "  --repeat N   run N times more and print the median time of a call\n"
    "  --graph      run the calls from a CUDA graph\n";

// --- errors --------------------------------------------------------------------------------------

enum ExitCode : int { kDone = 0, kBug = 1, kUsageError = 2, kMissing = 4, kArtifact = 6 };

struct Failure : std::runtime_error {
  Failure(ExitCode exit_code, const std::string &message, const std::string &fix = "")
      : std::runtime_error(fix.empty() ? message : message + "\n  fix: " + fix), code(exit_code) {}
  ExitCode code;
};

void check(cudaError_t status, const char *what) {
  if (status != cudaSuccess)
    throw Failure(kBug, std::string(what) + ": " + cudaGetErrorString(status));
}

// --- what must be released -----------------------------------------------------------------------

template <auto Release> struct Releaser {
  template <typename Handle> void operator()(Handle *handle) const { Release(handle); }
};
template <typename T, auto Release> using Owned = std::unique_ptr<T, Releaser<Release>>;

using Stream = Owned<std::remove_pointer_t<cudaStream_t>, cudaStreamDestroy>;
using Graph = Owned<std::remove_pointer_t<cudaGraph_t>, cudaGraphDestroy>;
using GraphExec = Owned<std::remove_pointer_t<cudaGraphExec_t>, cudaGraphExecDestroy>;
using PinnedFloats = Owned<float[], cudaFreeHost>;
using DeviceFloats = Owned<float[], cudaFree>;

PinnedFloats allocatePinned(std::size_t count) {
  void *memory = nullptr;
  check(cudaMallocHost(&memory, count * sizeof(float)), "no pinned memory");
  return PinnedFloats(static_cast<float *>(memory));
}

DeviceFloats allocateDevice(std::size_t count) {
  void *memory = nullptr;
  check(cudaMalloc(&memory, count * sizeof(float)), "no GPU memory");
  return DeviceFloats(static_cast<float *>(memory));
}

Stream makeStream() {
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "no CUDA stream");
  return Stream(stream);
}

// --- files ---------------------------------------------------------------------------------------

std::string readFile(const fs::path &path, ExitCode code, const std::string &fix) {
  std::error_code absent;
  const bool there = fs::is_regular_file(path, absent);
  std::string bytes(there ? static_cast<std::size_t>(fs::file_size(path)) : 0, '\0');
  std::ifstream file(path, std::ios::binary);
  if (!there || !file.read(bytes.data(), static_cast<std::streamsize>(bytes.size())))
    throw Failure(code, (there ? "cannot read " : "there is no file ") + path.string(), fix);
  return bytes;
}

std::string sha256(const std::string &bytes) {
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned int size = 0;
  if (EVP_Digest(bytes.data(), bytes.size(), digest, &size, EVP_sha256(), nullptr) != 1)
    throw Failure(kBug, "OpenSSL computes no SHA-256");
  constexpr char kDigits[] = "0123456789abcdef";
  std::string hex;
  for (unsigned int i = 0; i < size; ++i) {
    hex += kDigits[digest[i] >> 4];
    hex += kDigits[digest[i] & 15];
  }
  return hex;
}

// --- the bundle ----------------------------------------------------------------------------------

struct Shape { // of one input
  std::size_t channels, height, width;
  std::size_t size() const { return channels * height * width; }
  bool sane() const {
    const auto [least, most] = std::minmax({channels, height, width});
    return least >= 1 && most <= 65536;
  }
  std::string text() const {
    return std::to_string(width) + " x " + std::to_string(height) + " with " +
           std::to_string(channels) + (channels == 1 ? " channel" : " channels");
  }
};

struct Bundle { // what this program needs of manifest.json
  fs::path engine;
  std::string sha256, version, device;
  Shape input;
  std::size_t resize_shorter;
  bool exif_rotate;
  std::vector<float> mean, std;
  std::vector<std::string> class_names;
  bool gives_probabilities; // its softmax is part of the network
};

constexpr char kCopyAgain[] = "copy the bundle again, or build it again";

const nlohmann::json &findEngine(const nlohmann::json &manifest) {
  const int schema = manifest.at("schema_version").get<int>();
  if (schema < 1 || schema > 5)
    throw Failure(kArtifact, "manifest.json is of schema version " + std::to_string(schema) +
                                 ", this program reads 1 to 5");
  std::string others;
  for (const auto &target : manifest.at("targets")) {
    const auto &engine = target.at("engine");
    const auto name = engine.at("target").get<std::string>();
    if (name == kTarget)
      return engine;
    others += (others.empty() ? "; it has " : ", ") + name;
  }
  throw Failure(kArtifact, std::string("the bundle has no ") + kTarget + " engine" + others,
                std::string("build it with --target ") + kTarget);
}

Bundle parseManifest(const nlohmann::json &manifest, const fs::path &folder) {
  const auto &engine = findEngine(manifest);
  const fs::path relative = engine.at("path").get<std::string>();
  if (relative.is_absolute() || std::count(relative.begin(), relative.end(), "..") != 0)
    throw Failure(kArtifact,
                  "manifest.json names an engine outside the bundle: " + relative.string());
  if (engine.value("stripped", false))
    throw Failure(kArtifact, "the engine is without weights, which this program does not put back",
                  "build the bundle without --strip-weights, or use the Python cswap-run");
  const auto &model = manifest.at("model");
  const auto task = model.value("task", "classify"); // 1 and 2 had classifiers alone
  if (task != "classify")
    throw Failure(kUsageError, "the bundle is of task " + task + ", this program prints classes",
                  "use the Python cswap-run with -o");
  const auto &pre = model.at("preprocessing");
  const auto &size = pre.at("input_size");
  Bundle bundle;
  bundle.engine = folder / relative;
  bundle.sha256 = engine.at("sha256").get<std::string>();
  bundle.version = engine.at("versions").value(kTarget, "");
  bundle.device = engine.value("device", "");
  bundle.input = {size.at(0).get<std::size_t>(), size.at(1).get<std::size_t>(),
                  size.at(2).get<std::size_t>()};
  bundle.resize_shorter = pre.at("resize_shorter").get<std::size_t>();
  bundle.exif_rotate = pre.value("exif_rotate", false);
  bundle.mean = pre.at("mean").get<std::vector<float>>();
  bundle.std = pre.at("std").get<std::vector<float>>();
  bundle.class_names = model.value("class_names", std::vector<std::string>());
  bundle.gives_probabilities = model.value("output_kind", "logits") == "probabilities";
  if (!bundle.input.sane() || bundle.mean.size() != bundle.input.channels ||
      bundle.std.size() != bundle.input.channels)
    throw Failure(kArtifact, "manifest.json gives no sound input size, mean and std", kCopyAgain);
  return bundle;
}

Bundle readManifest(const fs::path &folder) {
  const std::string text = readFile(folder / "manifest.json", kArtifact,
                                    "name the folder that `cswap-deploy build -o` wrote");
  try {
    return parseManifest(nlohmann::json::parse(text), folder);
  } catch (const nlohmann::json::exception &err) {
    throw Failure(kArtifact, std::string("manifest.json is damaged: ") + err.what(), kCopyAgain);
  }
}

std::string readEngine(const Bundle &bundle) {
  std::string bytes = readFile(bundle.engine, kArtifact, kCopyAgain);
  if (sha256(bytes) != bundle.sha256)
    throw Failure(kArtifact, bundle.engine.string() + " is not the file that manifest.json lists",
                  kCopyAgain);
  return bytes;
}

// An engine runs with the very version that built it. The bundle may say less: "10.14", or more:
// "10.14.1.48.post1".
void checkVersion(const Bundle &bundle) {
  const std::string here = std::to_string(getInferLibMajorVersion()) + "." +
                           std::to_string(getInferLibMinorVersion()) + "." +
                           std::to_string(getInferLibPatchVersion()) + "." +
                           std::to_string(getInferLibBuildVersion());
  const auto begins = [](const std::string &text, const std::string &with) {
    return (text + ".").compare(0, with.size() + 1, with + ".") == 0;
  };
  if (bundle.version.empty() || !(begins(here, bundle.version) || begins(bundle.version, here)))
    throw Failure(kArtifact,
                  std::string("the engine was built with ") + kTarget + " " +
                      (bundle.version.empty() ? "of an unknown version" : bundle.version) +
                      ", this program runs with " + here,
                  "install that version here, or build the bundle with " + here);
}

// --- inputs --------------------------------------------------------------------------------------

struct Batch {
  std::vector<std::string> names;
  std::vector<float> values; // (names.size(), C, H, W)
};

std::string howToPrepare(const Bundle &bundle, const std::string &name) {
  const std::string size =
      std::to_string(bundle.input.width) + "x" + std::to_string(bundle.input.height);
  const std::string resized =
      bundle.input.width == bundle.input.height
          ? std::to_string(bundle.resize_shorter) + "x" + std::to_string(bundle.resize_shorter)
          : size;
  const std::string stem = fs::path(name).stem().string();
  const bool grey = bundle.input.channels == 1;
  return "convert " + name + (bundle.exif_rotate ? " -auto-orient" : "") + " -resize '" + resized + "^' -gravity center -extent " + size +
         (grey ? " -colorspace Gray" : "") + " -depth 8 " + stem + "-" + size +
         (grey ? ".pgm" : ".ppm") +
         ", or, for the very pixels that the network was measured on: cswap-run BUNDLE " + name +
         " --save-input " + stem + ".npy";
}

// The next number of a PNM header, after blanks and comments; 0 where there is none.
std::size_t pnmNumber(const std::string &bytes, std::size_t &at) {
  while (at < bytes.size() &&
         (std::isspace(static_cast<unsigned char>(bytes[at])) != 0 || bytes[at] == '#'))
    at = bytes[at] == '#' ? std::min(bytes.find('\n', at), bytes.size()) : at + 1;
  std::size_t number = 0;
  const char *begin = bytes.data() + at;
  at += static_cast<std::size_t>(std::from_chars(begin, bytes.data() + bytes.size(), number).ptr -
                                 begin);
  return number;
}

// (pixel / 255 - mean) / std in float32, in the order of cswap_deploy/runtime/preprocess.py. A grey
// picture is repeated where the network takes colours.
void addPicture(const std::string &bytes, const std::string &name, const Bundle &bundle,
                Batch &batch) {
  const Shape &want = bundle.input;
  std::size_t at = 2;
  const std::size_t width = pnmNumber(bytes, at);
  const std::size_t height = pnmNumber(bytes, at);
  const std::size_t largest = pnmNumber(bytes, at);
  ++at; // one blank before the pixels
  const Shape have{bytes[1] == '6' ? std::size_t{3} : std::size_t{1}, height, width};
  if (largest != 255)
    throw Failure(kUsageError,
                  name + " is not an 8-bit picture: its largest value is " +
                      std::to_string(largest) + ", not 255",
                  howToPrepare(bundle, name));
  if (have.width != want.width || have.height != want.height ||
      (have.channels != want.channels && have.channels != 1))
    throw Failure(kUsageError,
                  name + " is " + have.text() + ", the network takes " + want.text() +
                      "; this program does not resize",
                  howToPrepare(bundle, name));
  if (at > bytes.size() || bytes.size() - at < have.size())
    throw Failure(kUsageError, name + " ends before its last pixel", howToPrepare(bundle, name));
  for (std::size_t c = 0; c < want.channels; ++c)
    for (std::size_t i = 0; i < want.height * want.width; ++i) {
      const auto pixel = static_cast<unsigned char>(
          bytes[at + i * have.channels + std::min(c, have.channels - 1)]);
      batch.values.push_back((static_cast<float>(pixel) / 255.0F - bundle.mean[c]) / bundle.std[c]);
    }
  batch.names.push_back(name);
}

// What stands between two marks of an .npy header; NumPy always writes the same spelling.
std::string between(std::string_view header, std::string_view open, char close) {
  const std::size_t begin = header.find(open);
  if (begin == std::string_view::npos)
    return "";
  const std::string_view rest = header.substr(begin + open.size());
  return std::string(rest.substr(0, rest.find(close)));
}

void addTensor(const std::string &bytes, const std::string &name, const Bundle &bundle,
               Batch &batch) {
  const Shape &want = bundle.input;
  const auto byte = [&](std::size_t i) {
    return i < bytes.size() ? std::size_t{static_cast<unsigned char>(bytes[i])} : std::size_t{0};
  };
  const std::size_t start = byte(6) == 1 ? 10 : 12;
  const std::size_t data = start + byte(8) + (byte(9) << 8) +
                           (start == 12 ? (byte(10) << 16) + (byte(11) << 24) : std::size_t{0});
  const std::string_view header =
      std::string_view(bytes).substr(std::min(start, bytes.size()), data - start);
  const std::string dtype = between(header, "'descr': '", '\''),
                    order = between(header, "'fortran_order': ", ','),
                    dims = between(header, "'shape': (", ')');
  const std::string fix = "write float32, (C, H, W) or (N, C, H, W), as `cswap-run BUNDLE " +
                          fs::path(name).stem().string() + ".jpg --save-input " + name + "` does";
  const std::string one = std::to_string(want.channels) + ", " + std::to_string(want.height) +
                          ", " + std::to_string(want.width);
  const bool single = dims == one;
  const std::string tail = ", " + one;
  std::size_t count = single ? 1 : 0;
  if (!single && dims.size() > tail.size()) {
    const char *end = dims.data() + dims.size() - tail.size();
    if (std::from_chars(dims.data(), end, count).ptr != end || tail != end)
      count = 0;
  }
  if (dtype != "<f4" || order != "False" || count == 0)
    throw Failure(kUsageError,
                  name + " has dtype " + dtype + (order == "True" ? ", column-major" : "") +
                      " and shape (" + dims + "); the network takes float32 (N, " + one + ")",
                  fix);
  if (data > bytes.size() || (bytes.size() - data) / sizeof(float) / want.size() < count)
    throw Failure(kUsageError, name + " ends before its last number", fix);
  const std::size_t before = batch.values.size();
  batch.values.resize(before + count * want.size());
  std::memcpy(batch.values.data() + before, bytes.data() + data,
              count * want.size() * sizeof(float));
  for (std::size_t i = 0; i < count; ++i)
    batch.names.push_back(single ? name : name + "[" + std::to_string(i) + "]");
}

Batch readInputs(const std::vector<std::string> &paths, const Bundle &bundle) {
  Batch batch;
  for (const std::string &path : paths) {
    const std::string bytes = readFile(path, kUsageError, "");
    const std::string magic = bytes.substr(0, 6);
    if (magic == "\x93NUMPY")
      addTensor(bytes, path, bundle, batch);
    else if (magic.compare(0, 2, "P5") == 0 || magic.compare(0, 2, "P6") == 0)
      addPicture(bytes, path, bundle, batch);
    else
      throw Failure(kUsageError, path + " is neither a binary PPM, a binary PGM nor an .npy",
                    howToPrepare(bundle, path));
  }
  return batch;
}

// --- the device ----------------------------------------------------------------------------------

void checkDevice(const Bundle &bundle) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess || count == 0)
    throw Failure(kMissing,
                  std::string("no CUDA device: ") +
                      (status == cudaSuccess ? "none is visible" : cudaGetErrorString(status)),
                  "run this where `nvidia-smi` lists a GPU, with a driver for this CUDA runtime");
  cudaDeviceProp device{};
  check(cudaGetDeviceProperties(&device, 0), "no properties of device 0");
  if (!kPortable && !bundle.device.empty() && bundle.device.find(device.name) == std::string::npos)
    throw Failure(kArtifact,
                  "the engine was built for " + bundle.device + ", this is " + device.name,
                  "build the bundle on this device");
}

class Log final : public nvinfer1::ILogger {
public:
  void log(Severity severity, const char *words) noexcept override {
    if (severity <= Severity::kERROR && error_.empty())
      error_ = words;
    else if (severity <= Severity::kWARNING)
      std::fprintf(stderr, "%s: %s\n", kTarget, words);
  }
  std::string error() const { return error_.empty() ? "no reason given" : error_; }

private:
  std::string error_;
};

class Classifier {
public:
  Classifier(const std::string &engine, const Bundle &bundle, const Batch &batch)
      : runtime_(nvinfer1::createInferRuntime(log_)) {
    if (!runtime_)
      throw Failure(kMissing, std::string(kTarget) + " makes no runtime: " + log_.error(),
                    "build this program with the headers of the library that is installed");
    engine_.reset(runtime_->deserializeCudaEngine(engine.data(), engine.size()));
    if (!engine_)
      throw Failure(kArtifact, bundle.engine.string() + " does not load: " + log_.error(),
                    "build the bundle for this device, with this version");
    findTensors(bundle.input, batch.names.size());
    context_.reset(engine_->createExecutionContext());
    if (!context_)
      throw Failure(kBug, "no execution context: " + log_.error());
    input_ = allocatePinned(batch.values.size());
    output_ = allocatePinned(batch.names.size() * classes_);
    device_input_ = allocateDevice(batch.values.size());
    device_output_ = allocateDevice(batch.names.size() * classes_);
    input_bytes_ = batch.values.size() * sizeof(float);
    output_bytes_ = batch.names.size() * classes_ * sizeof(float);
    std::memcpy(input_.get(), batch.values.data(), input_bytes_);
    nvinfer1::Dims shape{};
    shape.nbDims = 4;
    shape.d[0] = static_cast<std::int64_t>(batch.names.size());
    shape.d[1] = static_cast<std::int64_t>(bundle.input.channels);
    shape.d[2] = static_cast<std::int64_t>(bundle.input.height);
    shape.d[3] = static_cast<std::int64_t>(bundle.input.width);
    if (!context_->setInputShape(input_name_.c_str(), shape) ||
        !context_->setTensorAddress(input_name_.c_str(), device_input_.get()) ||
        !context_->setTensorAddress(output_name_.c_str(), device_output_.get()))
      throw Failure(kArtifact, "the engine does not take this input: " + log_.error());
  }

  // One call: copy in, execute, copy out, wait. The logits of input n start at n * classes().
  const float *run() {
    if (graph_)
      check(cudaGraphLaunch(graph_.get(), stream_.get()), "the CUDA graph was not launched");
    else
      enqueue();
    check(cudaStreamSynchronize(stream_.get()), "the engine did not finish");
    return output_.get();
  }

  // From here on `run` launches a CUDA graph. Call it after a first `run`: TensorRT may allocate
  // and load kernels there, which cannot be captured.
  void capture() {
    check(cudaStreamBeginCapture(stream_.get(), cudaStreamCaptureModeThreadLocal),
          "no capture was begun");
    enqueue();
    cudaGraph_t captured = nullptr;
    const cudaError_t status = cudaStreamEndCapture(stream_.get(), &captured);
    const Graph graph(captured);
    check(status, "the engine cannot be captured in a CUDA graph");
    cudaGraphExec_t executable = nullptr;
    check(cudaGraphInstantiateWithFlags(&executable, graph.get(), 0), "no CUDA graph");
    graph_.reset(executable);
  }

  std::size_t classes() const { return classes_; }

private:
  void findTensors(const Shape &input, std::size_t count) {
    for (std::int32_t i = 0; i < engine_->getNbIOTensors(); ++i) {
      const char *name = engine_->getIOTensorName(i);
      const bool is_input = engine_->getTensorIOMode(name) == nvinfer1::TensorIOMode::kINPUT;
      std::string &mine = is_input ? input_name_ : output_name_;
      if (!mine.empty() || engine_->getTensorDataType(name) != nvinfer1::DataType::kFLOAT)
        throw Failure(kArtifact, std::string("the engine's tensor ") + name +
                                     " is not its only float32 " + (is_input ? "input" : "output"));
      mine = name;
    }
    if (input_name_.empty() || output_name_.empty())
      throw Failure(kArtifact, "the engine lacks an input or an output");
    const nvinfer1::Dims takes = engine_->getTensorShape(input_name_.c_str());
    const nvinfer1::Dims gives = engine_->getTensorShape(output_name_.c_str());
    const auto is = [](std::int64_t dim, std::size_t want) {
      return dim == static_cast<std::int64_t>(want);
    };
    if (takes.nbDims != 4 || !is(takes.d[1], input.channels) || !is(takes.d[2], input.height) ||
        !is(takes.d[3], input.width) || gives.nbDims != 2 || gives.d[1] < 1)
      throw Failure(kArtifact, "the engine's shapes are not those of manifest.json");
    classes_ = static_cast<std::size_t>(gives.d[1]);
    const auto limit = [&](nvinfer1::OptProfileSelector which) {
      return engine_->getProfileShape(input_name_.c_str(), 0, which).d[0];
    };
    const std::int64_t least = limit(nvinfer1::OptProfileSelector::kMIN),
                       most = limit(nvinfer1::OptProfileSelector::kMAX);
    const auto have = static_cast<std::int64_t>(count);
    if (have < least || have > most)
      throw Failure(kUsageError,
                    std::to_string(have) + " inputs; the engine takes batches of " +
                        std::to_string(least) + " to " + std::to_string(most),
                    "give it that many, or build the bundle for other batches");
  }

  void enqueue() {
    check(cudaMemcpyAsync(device_input_.get(), input_.get(), input_bytes_, cudaMemcpyHostToDevice,
                          stream_.get()),
          "the input was not copied");
    if (!context_->enqueueV3(stream_.get()))
      throw Failure(kBug, "the engine did not run: " + log_.error());
    check(cudaMemcpyAsync(output_.get(), device_output_.get(), output_bytes_,
                          cudaMemcpyDeviceToHost, stream_.get()),
          "the output was not copied");
  }

  // Released from the last to the first: nothing outlives what it was made from.
  Log log_;
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
  std::string input_name_, output_name_;
  std::size_t classes_ = 0, input_bytes_ = 0, output_bytes_ = 0;
  PinnedFloats input_, output_;
  DeviceFloats device_input_, device_output_;
  std::unique_ptr<nvinfer1::IExecutionContext> context_;
  Stream stream_ = makeStream();
  GraphExec graph_;
};

// --- results -------------------------------------------------------------------------------------

std::vector<double> softmax(const float *logits, std::size_t classes) {
  const double largest = *std::max_element(logits, logits + classes);
  std::vector<double> p(classes);
  std::transform(logits, logits + classes, p.begin(),
                 [&](float logit) { return std::exp(logit - largest); });
  const double sum = std::accumulate(p.begin(), p.end(), 0.0);
  for (double &value : p)
    value /= sum;
  return p;
}

std::vector<double> probabilities(const float *outputs, std::size_t classes, const Bundle &bundle) {
  return bundle.gives_probabilities ? std::vector<double>(outputs, outputs + classes)
                                    : softmax(outputs, classes);
}

void printTop(const std::string &name, const std::vector<double> &p, std::size_t top,
              const std::vector<std::string> &class_names) {
  std::vector<std::size_t> order(p.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return p[a] > p[b]; });
  std::printf("%s\n", name.c_str());
  for (std::size_t rank = 0; rank < std::min(top, order.size()); ++rank) {
    const std::size_t index = order[rank];
    const char *label = index < class_names.size() ? class_names[index].c_str() : "";
    std::printf("  %8.4f %%  %4zu  %s\n", 100.0 * p[index], index, label);
  }
}

void printMedian(Classifier &classifier, int repeat, std::size_t batch) {
  std::vector<double> milliseconds;
  for (int i = 0; i < repeat; ++i) {
    const auto start = std::chrono::steady_clock::now();
    classifier.run();
    const std::chrono::duration<double, std::milli> spent =
        std::chrono::steady_clock::now() - start;
    milliseconds.push_back(spent.count());
  }
  std::sort(milliseconds.begin(), milliseconds.end());
  std::printf("%d calls of batch %zu, median %.3f ms, copies included\n", repeat, batch,
              milliseconds[milliseconds.size() / 2]);
}

// --- the command ---------------------------------------------------------------------------------

struct Options {
  std::string bundle;
  std::vector<std::string> inputs;
  int top = 5, repeat = 0;
  bool graph = false, help = false;
};

int parseNumber(const std::string &flag, const std::string &text) {
  int number = 0;
  const char *end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, number);
  if (error != std::errc() || stop != end || number < 1)
    throw Failure(kUsageError, flag + " takes a whole number above 0, not '" + text + "'");
  return number;
}

Options parseArguments(const std::vector<std::string> &arguments) {
  Options options;
  std::vector<std::string> positional;
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    const std::string &word = arguments[i];
    if (word == "--top" || word == "--repeat")
      (word == "--top" ? options.top : options.repeat) =
          parseNumber(word, ++i < arguments.size() ? arguments[i] : "");
    else if (word == "--graph")
      options.graph = true;
    else if (word == "--help" || word == "-h")
      options.help = true;
    else if (word.size() > 1 && word[0] == '-')
      throw Failure(kUsageError, "there is no flag " + word, "cswap_run --help");
    else
      positional.push_back(word);
  }
  if (options.help)
    return options;
  if (positional.size() < 2)
    throw Failure(kUsageError, "a bundle and an input are needed", "cswap_run BUNDLE cat.ppm");
  options.bundle = positional.front();
  options.inputs.assign(positional.begin() + 1, positional.end());
  return options;
}

void run(const Options &options) {
  const Bundle bundle = readManifest(options.bundle);
  const std::string engine = readEngine(bundle);
  checkVersion(bundle);
  const Batch batch = readInputs(options.inputs, bundle);
  checkDevice(bundle);

  Classifier classifier(engine, bundle, batch);
  if (options.graph) {
    classifier.run();
    classifier.capture();
  }
  const float *outputs = classifier.run();
  const std::size_t classes = classifier.classes();
  for (std::size_t n = 0; n < batch.names.size(); ++n)
    printTop(batch.names[n], probabilities(outputs + n * classes, classes, bundle),
             static_cast<std::size_t>(options.top), bundle.class_names);
  if (options.repeat > 0)
    printMedian(classifier, options.repeat, batch.names.size());
}

} // namespace

int main(int argc, char **argv) {
  try {
    const Options options = parseArguments({argv + 1, argv + argc});
    if (options.help)
      std::fputs(kUsage, stdout);
    else
      run(options);
    return kDone;
  } catch (const Failure &failure) {
    std::fprintf(stderr, "error: %s\n", failure.what());
    return failure.code;
  } catch (const std::exception &bug) {
    std::fprintf(stderr, "error: %s\n", bug.what());
    return kBug;
  }
}
