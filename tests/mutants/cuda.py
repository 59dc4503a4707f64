"""Faults of the CUDA kernels and their planner, seen by the tests that run them on the CPU."""

from . import Mutant

FORWARD, BACKWARD = (
    "cuda/contiguous_pipelined_forward.cuh",
    "cuda/contiguous_pipelined_backward.cuh",
)
BLOCK, TILE = "cuda/contiguous_pipelined.cuh", "cuda/tile.h"
REGISTERS, SHARED = "cuda/channels_last_registers.cuh", "cuda/channels_last_shared.cuh"
GATES = "cuda/channels_last_gate.cuh"
COMMON, FINISH = "cuda/device_common.cuh", "cuda/finish_kernels.cuh"
PLAN, UNITS = "cuda/plan_contiguous.h", "cuda/units.h"
PLAN_LANES = "cuda/plan_channels_last.h"
PIXEL = "ppcr_pixel.h"
BIG = "more_than_2"

MUTANTS = (
    # the pixel mathematics of four equal segments, which the CPU has in another form
    Mutant(
        "wrong bin edge, standard levels",
        PIXEL,
        "l < 3 ? 2 * (l - 1) : l - 3",
        "l < 3 ? l - 1 : l - 3",
    ),
    Mutant(
        "wrong bin size, standard levels",
        PIXEL,
        "inverse[l == 0 ? 0 : l < 3 ? 1 : 2]",
        "inverse[l == 0 ? 0 : 1]",
    ),
    # barriers
    Mutant(
        "missing barrier before the row sums",
        BLOCK,
        "__syncthreads(); const unsigned rank",
        "const unsigned rank",
        sample=True,
    ),
    Mutant(
        "missing barrier behind the row sums", BLOCK, "if (tile.cluster == 1) __syncthreads();", ""
    ),
    Mutant(
        "missing barrier behind the gates, forward",
        FORWARD,
        "__syncthreads(); index = opaque(index);",
        "",
    ),
    Mutant(
        "missing barrier behind the gates, backward",
        BACKWARD,
        "__syncthreads(); index = opaque(index);",
        "",
    ),
    Mutant(
        "barrier in divergent code",
        BLOCK,
        "__syncthreads(); const unsigned rank",
        "if (threadIdx.x < 64) __syncthreads();\n    const unsigned rank",
    ),
    # what is copied ahead, and what blocks send one another
    Mutant(
        "x not waited for, forward", FORWARD, "if constexpr (kSlots) wait_for_copies<kLater>();", ""
    ),
    Mutant(
        "copies not waited for, backward",
        BACKWARD,
        "if constexpr (kSlots) wait_for_copies<0>();",
        "",
        sample=True,
    ),
    Mutant(
        "residual not waited for",
        FORWARD,
        "if constexpr (kSlots && kAdd) wait_for_copies<kLater>();",
        "",
    ),
    Mutant(
        "a group of copies too few waited for",
        FORWARD,
        "constexpr int kLater = kAdd ? 1 : 0;",
        "constexpr int kLater = kAdd ? 2 : 1;",
    ),
    Mutant(
        "vector of a neighbouring thread",
        FORWARD,
        "cached[r] = *xs.at(r);",
        "cached[r] = *Slots<T, V>{xs.own + (threadIdx.x % 2 ? -kSlotBytes : kSlotBytes)}.at(r);",
    ),
    Mutant(
        "sums of other blocks read before they have come",
        BLOCK,
        "if (tile.cluster > 1) wait_for(barriers + (turn & 1), turn >> 1 & 1);",
        "",
    ),
    Mutant(
        "barrier counts a block too few",
        BLOCK,
        "unsigned(count * tile.cluster * int(sizeof(A)))",
        "unsigned(count * (tile.cluster - 1) * int(sizeof(A)))",
    ),
    Mutant(
        "parts of two tiles in one place",
        BLOCK,
        "int(turn & 1) * memory.part_values",
        "0 * memory.part_values",
    ),
    Mutant(
        "one barrier for two tiles",
        BLOCK,
        "Mbarrier* const barrier = barriers + (turn & 1);",
        "Mbarrier* const barrier = barriers;",
    ),
    Mutant("sent before the cluster has begun", BLOCK, "if (tile.cluster > 1) cluster_wait();", ""),
    Mutant(
        "a block that leaves while others send to it",
        FORWARD,
        "block.exchange();",
        "block.exchange(); if (kGate && !block.is_first() && index + block.tile_stride() >= "
        "tile.tiles) return;",
    ),
    # tiles
    Mutant(
        "a tile left out",
        FORWARD,
        "index += block.tile_stride()",
        "index += block.tile_stride() + 1",
        sample=True,
    ),
    Mutant(
        "share of the last tile alone",
        BACKWARD,
        "contributions[l * tile.q + q] += dz * pixel.n[l];",
        "contributions[l * tile.q + q] = dz * pixel.n[l];",
    ),
    Mutant("quotient off by one", TILE, "/ divisor + 1), shift};", "/ divisor), shift};"),
    Mutant(
        "missing __syncthreads, channels_last_registers forward",
        REGISTERS,
        "__syncthreads();  // the sums",
        "// the sums",
    ),
    Mutant("missing __syncwarp, channels_last_registers forward", REGISTERS, "__syncwarp();", ""),
    Mutant(
        "missing __syncthreads, channels_last_registers backward",
        REGISTERS,
        "__syncthreads(); place.offset",
        "place.offset",
    ),
    Mutant(
        "missing barrier behind the sums, channels_last_gate forward",
        GATES,
        "__syncthreads();  // the sums are",
        "if constexpr (is_backward(PASS)) __syncthreads();  // the sums are",
    ),
    Mutant(
        "missing barrier behind the shares, channels_last_gate",
        GATES,
        "__syncthreads(); PPCR_UNROLL",
        "PPCR_UNROLL",
    ),
    Mutant(
        "gates of pixels beyond the tensor",
        GATES,
        "if (!exists) return;",
        "if (lane >= G::kWarpPixels) return;",
    ),
    Mutant(
        "last channels of a segment not summed, channels_last_gate",
        GATES,
        "channel < place.channels_left; channel += G::kStride) { Word<T, V> words",
        "channel + G::kStride <= place.channels_left; channel += G::kStride) { Word<T, V> words",
    ),
    Mutant(
        "missing barrier behind the copy, channels_last_shared",
        SHARED,
        "edges[k] = tile.edge[k]; __syncthreads();",
        "edges[k] = tile.edge[k];",
    ),
    Mutant(
        "missing barrier behind the sums, channels_last_shared",
        SHARED,
        "}); __syncthreads(); const int own",
        "});\n  const int own",
    ),
    Mutant(
        "missing barrier before the copy back, channels_last_shared",
        SHARED,
        "__syncthreads(); const int done",
        "const int done",
    ),
    Mutant("missing __syncthreads, finishing sums", FINISH, "__syncthreads();", ""),
    # bounds
    Mutant(
        "one step too many, any bins",
        TILE,
        "unsigned(left + tile.rows * tile.q - 1)",
        "unsigned(left + tile.rows * tile.q)",
    ),
    Mutant(
        "one step too many",
        TILE,
        "tile.steps - (element >= tile.last_step)",
        "tile.steps",
    ),
    Mutant(
        "last step of a unit too short",
        PLAN,
        "(unit_channels - (tile.steps - 1) * rows) * q",
        "(unit_channels - (tile.steps - 1) * rows) * q - vector",
    ),
    Mutant(
        "pixels beyond the image",
        BLOCK,
        "index < tile.tiles && place.first + thread.column < tile.image_pixels",
        "index < tile.tiles",
        sample=True,
    ),
    Mutant("tiles beyond the last", BLOCK, "index < tile.tiles && place.first", "place.first"),
    Mutant(
        "pixels beyond the tensor, channels_last_shared",
        SHARED,
        "tile.pixels - first < tile.q ? int(tile.pixels - first) : tile.q",
        "tile.q",
    ),
    Mutant(
        "tail of a copy forgotten, channels_last_shared",
        SHARED,
        "write_back<T, 1>(x, result_of<PASS>(tensors) + base, done, count);",
        "",
    ),
    Mutant(
        "vectors beyond the segment",
        REGISTERS,
        "&& r * G::kStride < channels_left",
        "",
    ),
    Mutant(
        "bias not staged", COMMON, "l <= contexts; l += blockDim.x", "l < contexts; l += blockDim.x"
    ),
    # indices, offsets
    Mutant(
        "offset of an image in 32 bits",
        BLOCK,
        "int64_t(place.image) * tile.image_elements",
        "int(place.image) * int(tile.image_elements)",
        tests=BIG,
    ),
    Mutant(
        "offset of a pixel in 32 bits",
        REGISTERS,
        "place.offset = pixel * lanes.channels",
        "place.offset = int(pixel) * int(lanes.channels)",
        tests=BIG,
    ),
    Mutant(
        "offset of a pixel in 32 bits, channels_last_shared",
        SHARED,
        "base = first * tile.channels",
        "base = int(first) * tile.channels",
        tests=BIG,
    ),
    Mutant(
        "straddling vector does not wrap",
        BLOCK,
        "column + j >= tile.q ? tile.q : 0",
        "column + j > tile.q ? tile.q : 0",
    ),
    Mutant(
        "sums of the first block for all of a cluster",
        BLOCK,
        "sum += parts[unit * tile.q + pixel];",
        "sum += parts[(unit & (tile.groups - 1)) * tile.q + pixel];",
    ),
    Mutant(
        "dot products in the lines of the sums",
        BLOCK,
        "parts + tile.rounds * groups * tile.q + pixel;",
        "parts + pixel;",
    ),
    Mutant(
        "lines of the second kind where another block's are",
        BLOCK,
        "(line >> tile.groups_log2) * (tile.cluster - 1) + int(rank)",
        "int(rank)",
    ),
    Mutant("last rows of a step not summed", BLOCK, "row < tile.rows;", "row + lanes < tile.rows;"),
    Mutant("sums behind the last column sent, too", BLOCK, "if (column > last) continue;", ""),
    Mutant("halves of two bfloat16 exchanged", COMMON, "j % 2 == 0 ? pairs", "j % 2 != 0 ? pairs"),
    Mutant(
        "shares of clusters overlap",
        BACKWARD,
        "partials[int64_t(l) * clusters + cluster]",
        "partials[int64_t(l) * (clusters - 1) + cluster]",
    ),
    # arithmetic
    Mutant(
        "sums rounded to x's type",
        BLOCK,
        "for (int j = 0; j < V; ++j) sum[j] += values[j];",
        "for (int j = 0; j < V; ++j) sum[j] = Acc<T>(T(sum[j] + values[j]));",
    ),
    Mutant(
        "one lane short in a shuffle",
        COMMON,
        "offset < lanes; offset <<= 1",
        "offset < lanes / 2; offset <<= 1",
        sample=True,
    ),
    Mutant(
        "mask of the ReLU lets zero pass",
        COMMON,
        "outputs[j] <= Acc<T>(0)",
        "outputs[j] < Acc<T>(0)",
    ),
    Mutant(
        "parameters of x's type read as wide ones",
        COMMON,
        "if (parameter.kind == Parameter::kOwn)",
        "if (parameter.kind == Parameter::kAbsent)",
    ),
    Mutant(
        "partial sums counted twice", FINISH, "i += kChains * kFinishThreads", "i += kFinishThreads"
    ),
    # plans
    Mutant(
        "misaligned vectors",
        PLAN,
        "if (vector * workload.element_size > workload.alignment ||",
        "if (",
    ),
    Mutant("one block on a multiprocessor", PLAN_LANES, "(blocks == 1 ? 2 : 1)", "1"),
    Mutant("straddling vectors without whole rows", PLAN, "rows -= rows % whole_vectors;", ""),
    Mutant(
        "last unit of a segment longer than the others",
        UNITS,
        "length / per_segment[k] * i + std::min<int64_t>(i, length % per_segment[k])",
        "length / per_segment[k] * i",
        survives="the same sums: steps of a unit beyond those in registers are read again, "
        "only more of them",
    ),
)
