#include "run_dtype.h"
template void ppcr::run_on_cpu<float>(const ppcr::CpuRun&);
