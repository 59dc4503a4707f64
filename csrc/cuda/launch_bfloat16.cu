#include "launch_dtype.cuh"

const ppcr::cuda::Kernels ppcr::cuda::kBFloat16 = ppcr::cuda::kernels_of<ppcr::cuda::BFloat16>();
