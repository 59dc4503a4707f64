#include "run_dtype.h"
template void ppcr::cuda::run_on_cpu<ppcr::cuda::BFloat16>(const ppcr::cuda::CpuRun&);
