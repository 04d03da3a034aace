# The CUDA kernels compiled for the host, by the C++ compiler alone: csrc/testing runs their threads on the CPU, and the
# operators of csrc/cuda serve CPU tensors. For tests, where there is no GPU; see csrc/testing/emulation.cpp.
#
#   cmake -S . -B build/emulated -G Ninja -DMANPP_CUDA=off -DMANPP_EMULATION=on && cmake --build build/emulated --target emulated
#
# The sanitizers find accesses out of bounds or off their alignment; Python then has to start with libasan preloaded.
if(MANPP_WITH_CUDA)
  message(FATAL_ERROR "MANPP_EMULATION=on needs MANPP_CUDA=off: a .cu file is compiled either for the GPU or for the host.")
endif()

set(emulated_kernels
  csrc/cuda/arrivals.cu
  csrc/cuda/chunks.cu
  csrc/cuda/ema_scale_update.cu
  csrc/cuda/ema_scale_update_backward.cu
  csrc/cuda/scale_bias_mix.cu
  csrc/cuda/scale_bias_mix_backward.cu
  csrc/cuda/detach_copy.cu)
set_source_files_properties(${emulated_kernels} PROPERTIES LANGUAGE CXX)

# All of the operators' library but its CPU kernels.
get_target_property(sources _C SOURCES)
list(FILTER sources EXCLUDE REGEX "^csrc/cpu/")
add_library(emulated MODULE EXCLUDE_FROM_ALL ${sources} csrc/testing/emulation.cpp ${emulated_kernels})
set_target_properties(emulated PROPERTIES
  OUTPUT_NAME _C_emulated PREFIX "" SUFFIX ".abi3.so" LIBRARY_OUTPUT_DIRECTORY "${MANPP_OUTPUT_DIR}"
  BUILD_WITH_INSTALL_RPATH ON)
target_include_directories(emulated BEFORE PRIVATE csrc/testing) # cuda_runtime.h
target_compile_definitions(emulated PRIVATE MANPP_EMULATION)
target_link_libraries(emulated PRIVATE stable_abi)
set(sanitizers -fsanitize=address,alignment,bounds,signed-integer-overflow -fno-sanitize-recover=all)
target_compile_options(emulated PRIVATE
  -O1 -g1 -ffp-contract=off ${sanitizers} -fno-strict-aliasing -Wall -Wextra -Wno-unused-parameter -Wno-unknown-pragmas)
target_link_options(emulated PRIVATE ${sanitizers})
