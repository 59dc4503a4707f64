"""Faults of the CPU kernels for channels_last, a part of the group cpu."""

from . import Mutant

FILE = "cpu/channels_last.h"

MUTANTS = (
    Mutant(
        "group of pixels beyond the run",
        FILE,
        "(i + j < count ? i + j : count - 1)",
        "(i + j)",
        tests="sanitize",
    ),
    Mutant(
        "later vectors of equal segments replace the first",
        FILE,
        "First ? x : v[i] + x",
        "x",
        tests="sanitize",
    ),
    Mutant(
        "first vectors of equal segments counted twice",
        FILE,
        "All{}, v, d, prefetch); begin += W;",
        "All{}, v, d, prefetch);",
        tests="sanitize",
    ),
    Mutant(
        "sums of lanes without a pixel not cleared",
        FILE,
        "for (int i = count; i < tile.stride; ++i)",
        "for (int i = tile.stride; i < tile.stride; ++i)",
    ),
    Mutant(
        "one of four vectors not summed",
        FILE,
        "(v[0] + v[1]) + (v[2] + v[3])",
        "(v[0] + v[1]) + v[2]",
        tests="sanitize",
    ),
    Mutant(
        "rest of a segment dropped",
        FILE,
        "add_channels(tile, {0}, c, end, v, d, false);",
        ";",
        tests="sanitize",
    ),
    Mutant(
        "first block of a segment dropped",
        FILE,
        "int64_t c = at[j] + p.pooling.edge[k];",
        "int64_t c = at[j] + p.pooling.edge[k] + 4 * W;",
        tests="sanitize",
    ),
    Mutant(
        "block taken from the segment's begin",
        FILE,
        "{c, c + unit, c + 2 * unit, c + 3 * unit}",
        "{c, c + unit, c + unit, c + 3 * unit}",
        tests="sanitize",
    ),
    Mutant(
        "stale gate: that of the pixel before",
        FILE,
        "end - c, tile.gates()[i] + V{}",
        "end - c, tile.gates()[i ? i - 1 : 0] + V{}",
    ),
    Mutant(
        "shift of the segment before",
        FILE,
        "? tile.row(k)[i] + V{}",
        "? tile.row(k ? k - 1 : 0)[i] + V{}",
        tests="sanitize",
    ),
    # segments that end within a vector
    Mutant(
        "stale gate by lane: that of the pixel before",
        FILE,
        "p.channels, tile.gates()[i] + V{}",
        "p.channels, tile.gates()[i ? i - 1 : 0] + V{}",
        tests="sanitize",
    ),
    Mutant(
        "lanes of the last segment take the shift of the one before",
        FILE,
        "tile.row(2)[i], tile.row(3)[i]}",
        "tile.row(2)[i], tile.row(2)[i]}",
        tests="sanitize",
    ),
    Mutant(
        "lanes of a pair numbered like those of a vector",
        FILE,
        "S(c + l * step)",
        "S(c + l)",
        tests="sanitize",
    ),
    Mutant(
        "all vectors of a pixel take the lanes of the first",
        FILE,
        "permute(shifts, *next++)",
        "permute(shifts, *next)",
        tests="sanitize",
    ),
    Mutant(
        "equal segments in the wrong order",
        FILE,
        "{c, c + size, c + 2 * size, c + 3 * size}",
        "{c, c + 2 * size, c + size, c + 3 * size}",
        tests="sanitize",
    ),
    # segments of whole blocks of four lanes
    Mutant(
        "blocks of a vector replace those of the one before",
        FILE,
        "sums + n * W / 4",
        "sums",
        tests="sanitize",
    ),
    Mutant(
        "last block of a segment left to the next",
        FILE,
        "b < blocks",
        "b < blocks - 1",
        tests="sanitize",
    ),
    Mutant(
        "blocks of the second half of the channels left out",
        FILE,
        "n < blocks * 16 / W",
        "n < blocks * 8 / W",
        tests="sanitize",
    ),
    Mutant(
        "one of four blocks not summed",
        "cpu/simd.h",
        "int i = 1; i < kLanes<S> / 4",
        "int i = 2; i < kLanes<S> / 4",
    ),
)
