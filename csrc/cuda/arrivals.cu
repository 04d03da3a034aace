// Whose the counters of a reduction's arrivals are. Two launches may share them only where one follows the other, for
// each finds them at zero and leaves them so:
//
// - Launches on one stream follow each other: a stream has counters of its own, for as long as the process lives. They
//   are told apart by their numbers, which are never used again, as handles are.
// - A graph may be replayed on any stream, beside anything, but not beside itself: the launches that one capture
//   records of one stream share counters that nobody else gets. They are not given back, for nothing tells when a graph
//   ends.
//
// All of them lie in one array that is zero when the library is loaded: nothing has to be allocated, or cleared by a
// launch. A kernel that does not come to its end leaves them as they are, and the whole context unusable with them.
#include "reduce.cuh"

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

namespace manpp::cuda {

namespace {

// Of streams and captures together: 1 MB, for 256 owners of the largest reductions, or 2^18 of a sum in one step. Launches of
// those past it have their counters cleared ahead of each.
constexpr uint32_t kCounters = 256 * kMostArrivals;

__device__ uint32_t counters_of_all[kCounters];

void check(cudaError_t error) {
  cuda::check(error, "the counters of a reduction cannot be had");
}

// The stream's number; the capture's plus one, or 0 where nothing is being captured. A stream that is capturing must not
// be asked for its number, which ends the capture: there its handle serves, which is nobody else's meanwhile.
using Owner = std::pair<unsigned long long, unsigned long long>;

Owner owner_of(cudaStream_t stream) {
  Owner owner;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamGetCaptureInfo(stream, &status, &owner.second));
  if (status == cudaStreamCaptureStatusNone) {
    owner.second = 0;
    check(cudaStreamGetId(stream, &owner.first));
  } else {
    ++owner.second;
    owner.first = reinterpret_cast<uintptr_t>(stream);
  }
  return owner;
}

struct Device {
  uint32_t* counters = nullptr;
  uint32_t taken = 0;
  std::map<std::pair<Owner, uint32_t>, uint32_t> places; // by how many they are: an owner may have several
};

// `size` counters of `owner` on the device, or nothing.
uint32_t* find_counters(int index, const Owner& owner, uint32_t size) {
  static std::mutex mutex;
  static auto* devices = new std::map<int, Device>(); // outlives whatever may still launch as the process ends
  std::lock_guard<std::mutex> lock(mutex);
  Device& device = (*devices)[index];
  if (device.counters == nullptr) {
    if (owner.second != 0) {
      return nullptr; // asking for the address may load the module, which is not to be tried inside a capture
    }
    void* address = nullptr;
    check(cudaGetSymbolAddress(&address, counters_of_all));
    device.counters = static_cast<uint32_t*>(address);
  }
  auto key = std::make_pair(owner, size);
  auto place = device.places.find(key);
  if (place == device.places.end()) {
    if (kCounters - device.taken < size) {
      return nullptr;
    }
    place = device.places.emplace(key, device.taken).first;
    device.taken += size;
  }
  return device.counters + place->second;
}

} // namespace

Arrivals arrivals(const Tensor& like, cudaStream_t stream, uint32_t count) {
  STD_TORCH_CHECK(count <= kMostArrivals, "manpp_kernels: a reduction with more sums than counters");
  Arrivals found;
  uint32_t size = 1; // few sizes, so that an owner has few places
  while (size < count) {
    size *= 4;
  }
  found.counters = find_counters(like.get_device_index(), owner_of(stream), std::min(size, kMostArrivals));
  if (found.counters == nullptr) {
    found.own = scratch(like, count * static_cast<int64_t>(sizeof(uint32_t)));
    found.counters = static_cast<uint32_t*>(found.own.data_ptr());
    check(cudaMemsetAsync(found.counters, 0, count * sizeof(uint32_t), stream));
  }
  return found;
}

} // namespace manpp::cuda
