#include "run_dtype.h"
template void ppcr::cuda::run_on_cpu<double>(const ppcr::cuda::CpuRun&);
