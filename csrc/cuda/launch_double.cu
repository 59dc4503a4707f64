#include "launch_dtype.cuh"

const ppcr::cuda::Kernels ppcr::cuda::kDouble{launch_dtype<double>, resident_clusters<double>};
