# The CUDA kernels, compiled into _C. No GPU is needed to build.
enable_language(CUDA)

# The static runtime is nvcc's, so that GPUs whose driver serves PyTorch's CUDA alone would refuse a newer one's code.
ask_python(TORCH_CUDA torch "import os, runpy; print(runpy.run_path(os.path.join('${TORCH_DIR}', 'version.py'))['cuda'])")
string(REGEX REPLACE "\\..*" "" torch_cuda_major "${TORCH_CUDA}")
if(NOT TORCH_CUDA STREQUAL "None" AND NOT CMAKE_CUDA_COMPILER_VERSION MATCHES "^${torch_cuda_major}\\.")
  message(WARNING "nvcc is of CUDA ${CMAKE_CUDA_COMPILER_VERSION}, and PyTorch of CUDA ${TORCH_CUDA}: the kernels will need "
    "a driver for the former. Set CUDACXX to an nvcc of PyTorch's version where yours is older.")
endif()

# Architectures as PyTorch's users name them: "8.0;9.0;10.0+PTX", separated by semicolons, commas or spaces.
set(arch_list "$ENV{TORCH_CUDA_ARCH_LIST}")
if(NOT arch_list)
  set(arch_list "8.0;9.0;10.0+PTX")
endif()
string(REGEX REPLACE "[ ,]+" ";" arch_list "${arch_list}")
set(gencode "")
set(names "")
foreach(arch IN LISTS arch_list)
  if(NOT arch MATCHES "^([0-9]+)\\.([0-9])(a?)(\\+PTX)?$")
    message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST has ${arch}; write architectures as 9.0 or 9.0+PTX.")
  endif()
  set(number "${CMAKE_MATCH_1}${CMAKE_MATCH_2}${CMAKE_MATCH_3}")
  if(CMAKE_MATCH_1 LESS 8)
    message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST has ${arch}; the kernels need compute capability 8.0 or higher.")
  endif()
  list(APPEND gencode "-gencode=arch=compute_${number},code=sm_${number}")
  list(APPEND names "sm_${number}")
  if(CMAKE_MATCH_4)
    list(APPEND gencode "-gencode=arch=compute_${number},code=compute_${number}")
    list(APPEND names "compute_${number}")
  endif()
endforeach()
list(JOIN names "," names)

target_sources(_C PRIVATE
  csrc/cuda/common.cu
  csrc/cuda/arrivals.cu
  csrc/cuda/chunks.cu
  csrc/cuda/ema_scale_update.cu
  csrc/cuda/ema_scale_update_backward.cu
  csrc/cuda/scale_bias_mix.cu
  csrc/cuda/scale_bias_mix_backward.cu
  csrc/cuda/detach_copy.cu)
target_compile_definitions(_C PRIVATE
  USE_CUDA MANPP_WITH_CUDA MANPP_CUDA_ARCHITECTURES="${names}")
target_compile_options(_C PRIVATE
  # One thread an architecture: they are compiled independently.
  "$<$<COMPILE_LANGUAGE:CUDA>:${gencode};--threads=0;--expt-relaxed-constexpr;--fmad=false;-Xcompiler=-fvisibility=hidden>")
# C++17 is all the kernels need, and every CMake knows how to ask for it. The static runtime: the library then needs no
# libcudart, and loads under a PyTorch that came without CUDA.
set_target_properties(_C PROPERTIES CUDA_RUNTIME_LIBRARY Static CUDA_ARCHITECTURES OFF CUDA_STANDARD 17)
target_link_libraries(_C PRIVATE dl)
