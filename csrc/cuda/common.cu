#include "common.cuh"

#include <dlfcn.h>

namespace manpp::cuda {

DeviceGuard::DeviceGuard(int device) {
  STD_TORCH_CHECK(cudaGetDevice(&before_) == cudaSuccess, "manpp_kernels: there is no CUDA device");
  if (before_ != device) {
    STD_TORCH_CHECK(cudaSetDevice(device) == cudaSuccess, "manpp_kernels: cannot switch to CUDA device ", device);
    changed_ = true;
  }
}

DeviceGuard::~DeviceGuard() {
  if (changed_) {
    cudaSetDevice(before_);
  }
}

cudaStream_t current_stream(int device) {
  // Looked up rather than linked, so that the library still loads under a PyTorch built without CUDA. Where a tensor on
  // a CUDA device exists, libtorch_cuda is loaded.
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
    if (symbol == nullptr) { // linked statically or under another name: look wherever this process has it
      symbol = dlsym(RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream");
    }
    return reinterpret_cast<Get>(symbol);
  }();
  STD_TORCH_CHECK(get != nullptr, "manpp_kernels: this PyTorch was built without CUDA");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaError_t error = cudaStreamIsCapturing(stream, &status);
  STD_TORCH_CHECK(error == cudaSuccess, "manpp_kernels: the stream cannot be used: ", cudaGetErrorString(error));
  return status != cudaStreamCaptureStatusNone;
}

void wait_for(cudaStream_t stream) {
  cudaError_t error = cudaStreamSynchronize(stream);
  STD_TORCH_CHECK(error == cudaSuccess, "manpp_kernels: work on the GPU failed: ", cudaGetErrorString(error));
}

void check_launch(const char* kernel) {
  cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "manpp_kernels: launching ", kernel, " failed: ", cudaGetErrorString(error));
}

Tensor scratch(const Tensor& like, int64_t bytes) {
  int64_t words = (bytes + 7) / 8;
  return torch::stable::new_empty(like, {&words, 1}, torch::headeronly::ScalarType::Long);
}

} // namespace manpp::cuda
