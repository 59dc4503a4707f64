// What the headers of the CUDA runtime take from the toolkit's file of this name, for g++. The
// wheel that PyTorch brings along lacks it.
#pragma once
#define __host__
#define __device__
#define __device_builtin__
#define __cudart_builtin__
#define __builtin_align__(n) __attribute__((aligned(n)))
#define __align__(n) __attribute__((aligned(n)))
#define CUDARTAPI
