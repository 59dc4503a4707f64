#include "launch_dtype.cuh"

const ppcr::cuda::Kernels ppcr::cuda::kDouble = ppcr::cuda::kernels_of<double>();
