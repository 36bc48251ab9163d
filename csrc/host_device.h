// Functions that the CPU and the CUDA path share.
#pragma once

#ifdef __CUDACC__
#define SV3D_HD __host__ __device__ __forceinline__
#else
// Always: or else a clone of the caller for another processor would call the function and not vectorise.
#define SV3D_HD inline __attribute__((always_inline))
#endif
