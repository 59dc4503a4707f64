#include "launch_dtype.cuh"

const ppcr::cuda::Kernels ppcr::cuda::kBFloat16{launch_dtype<BFloat16>,
                                                resident_clusters<BFloat16>};
