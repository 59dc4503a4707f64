// The schemas of all operators. Kernels are registered per device beside them: cpu/ppcr_cpu.cpp,
// and the CUDA library when it is built.
#include <torch/csrc/stable/library.h>

#define PPCR_PARAMETERS "Tensor weight, Tensor? bias, int[] levels, float eps"

STABLE_TORCH_LIBRARY(ppcr_ext, m) {
  m.def("ppcr(Tensor x, " PPCR_PARAMETERS ") -> Tensor");
  m.def("ppcr_backward(Tensor grad, Tensor x, " PPCR_PARAMETERS ") -> (Tensor, Tensor, Tensor)");
  m.def("ppcr_gate(Tensor x, " PPCR_PARAMETERS ") -> Tensor");
  m.def("ppcr_gate_backward(Tensor grad, Tensor x, " PPCR_PARAMETERS
        ") -> (Tensor, Tensor, Tensor)");
  m.def("ppcr_add_relu(Tensor x, Tensor residual, " PPCR_PARAMETERS ") -> Tensor");
  m.def("ppcr_add_relu_backward(Tensor grad, Tensor x, Tensor y, " PPCR_PARAMETERS
        ") -> (Tensor, Tensor, Tensor, Tensor)");
}
