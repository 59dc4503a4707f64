#include "run_dtype.h"
template void ppcr::run_on_cpu<ppcr::Half>(const ppcr::CpuRun&);
