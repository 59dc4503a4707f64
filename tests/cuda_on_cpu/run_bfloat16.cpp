#include "run_dtype.h"
template void ppcr::run_on_cpu<ppcr::BFloat16>(const ppcr::CpuRun&);
