// What a launch costs by the size of its parameters: an empty kernel, launched from C++. A table goes to standard output.
//
//     nvcc -O3 -std=c++17 -arch=native -o parameter_sizes bench/parameter_sizes.cu && ./parameter_sizes
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <utility>
#include <vector>

#include <cuda_runtime.h>

namespace {

constexpr int kLaunches = 100; // in a row, and in a graph
constexpr int kRounds = 41;
constexpr long long kHeadStart = 3'000'000; // cycles: the device begins once all is queued

template <int Bytes>
struct Parameters {
  char bytes[Bytes];
};

template <int Bytes>
__global__ void empty(const Parameters<Bytes> __grid_constant__ parameters, char* target) {
  if (target != nullptr) { // it never is, but the parameters have to be of use
    *target = parameters.bytes[blockIdx.x];
  }
}

__global__ void wait(long long cycles) {
  long long start = clock64();
  while (clock64() - start < cycles) {
  }
}

void check(cudaError_t error) {
  if (error != cudaSuccess) {
    std::fprintf(stderr, "parameter_sizes: %s\n", cudaGetErrorString(error));
    std::exit(1);
  }
}

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

template <class Call>
double host_us(const Call& call) {
  auto start = std::chrono::steady_clock::now();
  call();
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count();
}

template <class Call>
double device_us(cudaStream_t stream, const Call& call) {
  static auto events = [] {
    std::pair<cudaEvent_t, cudaEvent_t> made;
    check(cudaEventCreate(&made.first));
    check(cudaEventCreate(&made.second));
    return made;
  }();
  wait<<<1, 1, 0, stream>>>(kHeadStart);
  check(cudaEventRecord(events.first, stream));
  call();
  check(cudaEventRecord(events.second, stream));
  check(cudaStreamSynchronize(stream));
  float ms = 0;
  check(cudaEventElapsedTime(&ms, events.first, events.second));
  return 1e3 * ms;
}

template <int Bytes>
void measure(cudaStream_t stream) {
  auto parameters = std::make_unique<Parameters<Bytes>>();
  auto launch = [&] { empty<Bytes><<<1, 256, 0, stream>>>(*parameters, nullptr); };
  auto launch_all = [&] {
    for (int i = 0; i < kLaunches; ++i) {
      launch();
    }
  };
  cudaGraph_t graph;
  cudaGraphExec_t replayed;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  launch_all();
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaGraphInstantiate(&replayed, graph, 0));
  auto replay = [&] { check(cudaGraphLaunch(replayed, stream)); };
  replay();
  check(cudaStreamSynchronize(stream));

  std::vector<double> host, device, in_graph, until_done;
  for (int i = 0; i < kRounds; ++i) {
    host.push_back(host_us(launch_all) / kLaunches);
    check(cudaStreamSynchronize(stream));
    device.push_back(device_us(stream, launch_all) / kLaunches);
    in_graph.push_back(device_us(stream, replay) / kLaunches);
    until_done.push_back(host_us([&] {
      launch();
      check(cudaStreamSynchronize(stream));
    }));
  }
  check(cudaGetLastError());
  check(cudaGraphExecDestroy(replayed));
  check(cudaGraphDestroy(graph));
  std::printf(
      "%6d %8.2f %10.2f %10.2f %14.2f\n", Bytes, median(host), median(device), median(in_graph), median(until_done));
}

} // namespace

int main() {
  cudaStream_t stream;
  check(cudaStreamCreate(&stream));
  std::printf("microseconds a launch\n%6s %8s %10s %10s %14s\n", "bytes", "host", "device", "in a graph", "until done");
  measure<64>(stream);
  measure<1024>(stream);
  measure<4000>(stream);
  measure<8000>(stream);
  measure<16000>(stream);
  measure<24000>(stream);
  measure<32000>(stream);
  return 0;
}
