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

#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

namespace manpp::cuda {

namespace {

// Of streams and captures together: 1 MB. Those past it have their counters cleared ahead of every launch.
constexpr uint32_t kOwners = 512;

__device__ uint32_t counters_of_all[kOwners * kMostArrivals];

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
  std::map<Owner, uint32_t> places;
};

// The device's counters of `owner`, or nothing.
uint32_t* find_counters(int index, const Owner& owner) {
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
  auto place = device.places.find(owner);
  if (place == device.places.end()) {
    if (device.places.size() == kOwners) {
      return nullptr;
    }
    place = device.places.emplace(owner, static_cast<uint32_t>(device.places.size())).first;
  }
  return device.counters + place->second * kMostArrivals;
}

} // namespace

Arrivals arrivals(const Tensor& like, cudaStream_t stream, uint32_t count) {
  STD_TORCH_CHECK(count <= kMostArrivals, "manpp_kernels: a reduction with more sums than counters");
  Arrivals found;
  found.counters = find_counters(like.get_device_index(), owner_of(stream));
  if (found.counters == nullptr) {
    found.own = scratch(like, count * static_cast<int64_t>(sizeof(uint32_t)));
    found.counters = static_cast<uint32_t*>(found.own.data_ptr());
    check(cudaMemsetAsync(found.counters, 0, count * sizeof(uint32_t), stream));
  }
  return found;
}

} // namespace manpp::cuda
