#include "run_dtype.h"
template void ppcr::cuda::run_on_cpu<ppcr::cuda::Half>(const ppcr::cuda::CpuRun&);
