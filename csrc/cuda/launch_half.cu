#include "launch_dtype.cuh"

const ppcr::cuda::Kernels ppcr::cuda::kHalf{launch_dtype<Half>, resident_clusters<Half>};
