"""Faults of what all devices share, seen by the tests of the CPU library."""

from . import Mutant

PIXEL, TYPES, CHECKS = "ppcr_pixel.h", "ppcr_types.h", "checks.h"
OPERATORS, ENTRY = "operators.h", "cpu/ppcr_cpu.cpp"

MUTANTS = (
    # the pixel mathematics
    Mutant(
        "wrong sign in the contexts' gradient",
        PIXEL,
        "weight_mean) - pixel.n[l] * z_mean",
        "weight_mean) + pixel.n[l] * z_mean",
        sample=True,
    ),
    Mutant(
        "missing eps",
        PIXEL,
        "variance * inverse_contexts + eps",
        "variance * inverse_contexts",
        sample=True,
    ),
    Mutant(
        "unbiased variance", PIXEL, "variance * inverse_contexts +", "variance / S(contexts - 1) +"
    ),
    Mutant("contexts not taken relative to the first", PIXEL, "if (l == 0) pivot = t;", ""),
    Mutant(
        "bias left out of the gate",
        PIXEL,
        "Math::sigmoid(pixel.z + bias)",
        "Math::sigmoid(pixel.z)",
    ),
    Mutant(
        "derivative of the sigmoid cut short",
        PIXEL,
        "dg * pixel.g * (S(1) - pixel.g)",
        "dg * pixel.g",
    ),
    Mutant("sum instead of mean of dn n", PIXEL, "pixel.z * (S(1) / S(contexts))", "pixel.z"),
    Mutant(
        "last segment of a bin gets no gradient",
        PIXEL,
        "for (int k = first; k < last; ++k) dsums",
        "for (int k = first; k + 1 < last; ++k) dsums",
    ),
    Mutant(
        "last segment left out of its bin",
        PIXEL,
        "for (int k = first + 1; k < last; ++k) t",
        "for (int k = first + 1; k < last - 1; ++k) t",
    ),
    Mutant(
        "inverse standard deviation squared",
        PIXEL,
        "const V scale = dz * pixel.inv_std;",
        "const V scale = dz * pixel.inv_std * pixel.inv_std;",
    ),
    # pooling bins
    Mutant(
        "bins that never overlap",
        TYPES,
        "(up ? k - 1 : 0)",
        "0",
        sample=True,
    ),
    Mutant(
        "remainder of the channels left out of an edge",
        TYPES,
        "(i * (channels % k) + (up ? k - 1 : 0)) / k;",
        "(up ? (i * (channels % k) + k - 1) / k : 0);",
    ),
    Mutant(
        "bin size one too large",
        TYPES,
        "pooling.size[l] = end - begin;",
        "pooling.size[l] = end - begin + 1;",
    ),
    Mutant("four equal segments where 4 does not divide C", TYPES, " && channels % 4 == 0;", ";"),
    Mutant(
        "more contexts than the arrays hold",
        TYPES,
        "levels[i] > kMaxContexts - contexts",
        "levels[i] > kMaxContexts",
    ),
    Mutant("one context alone", TYPES, "if (contexts < 2)", "if (contexts < 1)"),
    Mutant(
        "product before quotient",
        TYPES,
        "return i * (channels / k) + (i * (channels % k) + (up ? k - 1 : 0)) / k;",
        "return (i * channels + (up ? k - 1 : 0)) / k;",
        survives="differs where 64 C leaves 64 bits, and no tensor has 2^57 channels",
    ),
    # the operators
    Mutant(
        "stride of weight ignored",
        OPERATORS,
        "weight = to_contiguous(given_weight);",
        "weight = given_weight;",
    ),
    Mutant(
        "shape of the gradient unchecked",
        OPERATORS,
        'check_like_x("grad", grad, x);',
        "",
        after="static Gradients ppcr_backward(",
    ),
    Mutant(
        "shape of the gate's gradient unchecked", OPERATORS, 'check_like_gate("grad", grad, x);', ""
    ),
    Mutant(
        "dbias takes dweight's value",
        ENTRY,
        "bias ? 1 : 0, d_parameters_ + pooling.contexts",
        "bias ? 1 : 0, d_parameters_",
    ),
    Mutant(
        "eps too small for the type",
        OPERATORS,
        "eps = std::max<double>(given_eps, is_double() ?",
        "eps = std::max<double>(given_eps, true ? 0. : is_double() ?",
    ),
    Mutant(
        "any stride of the channels taken for channels_last",
        CHECKS,
        "if (!dense(1)) return false;",
        "dense(1);",
    ),
    Mutant(
        "copies of one pixel per sample taken for channels of one pixel",
        CHECKS,
        "last || shape.pixels == 1",
        "last || (contiguous && shape.pixels == 1)",
    ),
    Mutant("gradient of another layout taken as it is", CHECKS, "if (same) return t;", "return t;"),
)
