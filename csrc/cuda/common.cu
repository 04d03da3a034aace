#include "common.cuh"

#include <dlfcn.h>

namespace manpp::cuda {

namespace {

// A function of libtorch_cuda: looked up rather than linked, so that the library still loads under a PyTorch built without
// CUDA. Where a tensor on a CUDA device exists, libtorch_cuda is loaded.
template <class Function>
Function find(const char* name) {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* symbol = library == nullptr ? nullptr : dlsym(library, name);
  if (symbol == nullptr) { // linked statically or under another name: look wherever this process has it
    symbol = dlsym(RTLD_DEFAULT, name);
  }
  STD_TORCH_CHECK(symbol != nullptr, "manpp_kernels: this PyTorch was built without CUDA");
  return reinterpret_cast<Function>(symbol);
}

} // namespace

DeviceGuard::DeviceGuard(int device) {
  int current = 0;
  check(cudaGetDevice(&current), "CUDA cannot be used");
  if (current != device) {
    // PyTorch's own, which does not make a context on the device it goes back to where this thread never used that.
    static const auto create = find<AOTITorchError (*)(int32_t, void**)>("aoti_torch_create_cuda_guard");
    STABLE_TORCH_ERROR_CODE_CHECK(create(device, &changed_));
  }
}

DeviceGuard::~DeviceGuard() {
  if (changed_ != nullptr) {
    static const auto destroy = find<AOTITorchError (*)(void*)>("aoti_torch_delete_cuda_guard");
    destroy(changed_);
  }
}

cudaStream_t current_stream(int device) {
  static const auto get = find<AOTITorchError (*)(int32_t, void**)>("aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status), "the stream cannot be used");
  return status != cudaStreamCaptureStatusNone;
}

void wait_for(cudaStream_t stream) {
  check(cudaStreamSynchronize(stream), "work on the GPU failed");
}

void check_launch(const char* kernel) {
  cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(
      error == cudaSuccess, "manpp_kernels: launching ", kernel, " failed: ", cudaGetErrorString(error),
      error == cudaErrorNoKernelImageForDevice
          ? " (reinstall with this GPU's compute capability in TORCH_CUDA_ARCH_LIST, or set MANPP_BACKEND=triton)"
          : "");
}

Tensor scratch(const Tensor& like, int64_t bytes) {
  int64_t words = (bytes + 7) / 8;
  return torch::stable::new_empty(like, {&words, 1}, torch::headeronly::ScalarType::Long);
}

} // namespace manpp::cuda
