// Functions that the CPU and the CUDA path share.
#pragma once

#ifdef __CUDACC__
#define SV3D_HD __host__ __device__ __forceinline__
#else
#define SV3D_HD inline
#endif
