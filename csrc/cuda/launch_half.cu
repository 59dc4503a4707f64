#include "launch_dtype.cuh"

const ppcr::cuda::Kernels ppcr::cuda::kHalf = ppcr::cuda::kernels_of<ppcr::cuda::Half>();
