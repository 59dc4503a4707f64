#include "run_dtype.h"
template void ppcr::cuda::run_on_cpu<float>(const ppcr::cuda::CpuRun&);
