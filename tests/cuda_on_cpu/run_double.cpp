#include "run_dtype.h"
template void ppcr::run_on_cpu<double>(const ppcr::CpuRun&);
