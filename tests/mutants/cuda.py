"""Faults of the CUDA kernels and their planner, seen by the tests that run them on the CPU."""

from . import Mutant

MAJOR, TILE = "cuda/channel_major_kernels.cuh", "cuda/channel_major_tile.cuh"
PIXEL, SHARED = "cuda/pixel_major_kernels.cuh", "cuda/pixel_tile_kernels.cuh"
COMMON, FINISH, PLAN, UNITS = "cuda/device_common.cuh", "cuda/finish_kernels.cuh", "cuda/plan.h", "cuda/units.h"
SYNC = "  __syncthreads();\n"
BACKWARD = "channel_major_backward(const"
BIG = "more_than_2"

MUTANTS = (
    # barriers
    Mutant("missing barrier before the row sums, forward", MAJOR, SYNC + "  sum_rows", "  sum_rows", after="gates = reinterpret_cast<A*>(raw) + memory.pixels;\n\n"),
    Mutant("missing barrier before the row sums, backward", MAJOR, SYNC + "  sum_rows", "  sum_rows", after=BACKWARD, sample=True),
    Mutant("missing barrier behind the row sums", MAJOR, "sums, parts);\n  block_or_cluster_sync(tile);", "sums, parts);", after=BACKWARD),
    Mutant("missing barrier behind the gates", MAJOR, "  block_or_cluster_sync(tile);  // also", "  // also", after=BACKWARD),
    Mutant("blocks of a cluster leave early", MAJOR, "  block_or_cluster_sync(tile);  // also", "  __syncthreads();  // also", after="if (thread.rank == 0 && thread.first + q"),
    Mutant("barrier in divergent code", MAJOR, SYNC + "  sum_rows", "  if (threadIdx.x < 64) __syncthreads();\n  sum_rows", after=BACKWARD),
    Mutant("missing __syncthreads, pixel-major forward", PIXEL, "  __syncthreads();  // the sums", "  // the sums"),
    Mutant("missing __syncwarp, pixel-major forward", PIXEL, "  __syncwarp();\n", ""),
    Mutant("missing __syncthreads, pixel-major backward", PIXEL, SYNC + "  if (int(threadIdx.x) <= kContexts)", "  if (int(threadIdx.x) <= kContexts)"),
    Mutant("missing barrier behind the copy, pixel tile", SHARED, "edges[k] = tile.edge[k];\n  __syncthreads();", "edges[k] = tile.edge[k];"),
    Mutant("missing barrier behind the sums, pixel tile", SHARED, "  });\n  __syncthreads();\n\n  const int own", "  });\n  const int own"),
    Mutant("missing barrier before the copy back, pixel tile", SHARED, "    __syncthreads();\n    const int done", "    const int done"),
    Mutant("missing __syncthreads, finishing sums", FINISH, SYNC, ""),
    # bounds
    Mutant("one step too many", TILE, "(left + stride - 1) / stride", "(left + stride) / stride"),
    Mutant("pixels beyond the image", TILE, "thread.active && thread.first + thread.column < tile.image_pixels", "thread.active", sample=True),
    Mutant("pixels beyond the tensor, pixel tile", SHARED, "tile.pixels - first < tile.q ? int(tile.pixels - first) : tile.q", "tile.q"),
    Mutant("tail of a copy forgotten, pixel tile", SHARED, "    write_back<T, 1>(x, tensors.out + base, done, count);\n", ""),
    Mutant("vectors beyond the segment", PIXEL, "inside && place.channel + r * G::kHop < lanes.segment", "inside", after="pixel_major_backward("),
    Mutant("bias not staged", COMMON, "l <= contexts; l += blockDim.x", "l < contexts; l += blockDim.x"),
    # indices, offsets
    Mutant("offset of an image in 32 bits", TILE, "int64_t(image) * tile.image_elements", "int(image) * int(tile.image_elements)", tests=BIG),
    Mutant("offset of a pixel in 32 bits", PIXEL, "place.offset = (place.first + place.group) * lanes.channels",
           "place.offset = int(place.first + place.group) * int(lanes.channels)", tests=BIG),
    Mutant("offset of a pixel in 32 bits, pixel tile", SHARED, "base = first * tile.channels", "base = int(first) * tile.channels", tests=BIG),
    Mutant("straddling vector does not wrap", TILE, "column + j >= tile.q ? tile.q : 0", "column + j > tile.q ? tile.q : 0"),
    Mutant("sums of the first block for all of a cluster", TILE, "cluster_load(part, unsigned(rank))", "cluster_load(part, 0u)"),
    Mutant("dot products in the lines of the sums", MAJOR, "dot_line = tile.rounds * tile.groups", "dot_line = 0"),
    Mutant("shares of tiles overlap", MAJOR, "partials[l * tiles + tile_index]", "partials[l * (tiles - 1) + tile_index]"),
    # arithmetic
    Mutant("sums rounded to x's type", MAJOR, "for (int j = 0; j < V; ++j) sum[j] += values[j];",
           "for (int j = 0; j < V; ++j) { T rounded; narrow(sum[j] + values[j], rounded); sum[j] = widen(rounded); }"),
    Mutant("one lane short in a shuffle", COMMON, "offset < lanes; offset <<= 1", "offset < lanes / 2; offset <<= 1", sample=True),
    Mutant("mask of the ReLU lets zero pass", COMMON, "outputs[j] <= Acc<T>(0)", "outputs[j] < Acc<T>(0)"),
    Mutant("parameters of x's type read as wide ones", COMMON, "if (parameter.kind == Parameter::kOwn)", "if (parameter.kind == Parameter::kAbsent)"),
    Mutant("partial sums counted twice", FINISH, "i += kStreams * kFinishThreads", "i += kFinishThreads"),
    # plans
    Mutant("misaligned vectors", PLAN, "if (vector * problem.element_size > problem.alignment ||", "if ("),
    Mutant("straddling vectors without whole rows", PLAN, "rows -= rows % whole_vectors;", ""),
    Mutant("last unit of a segment longer than the others", UNITS, "length / per_segment[k] * i + std::min<int64_t>(i, length % per_segment[k])", "length / per_segment[k] * i",
           survives="the same sums: steps of a unit beyond those held in registers are read again, only more of them"),
)  # fmt: skip
