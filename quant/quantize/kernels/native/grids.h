// The grids of the IQ1, IQ2 and IQ3 types: for every code that rounding can produce, its grid point or its neighbors on
// the grid.
#pragma once

#include <cstdint>

enum class GridName { iq2_xxs, iq2_xs, iq2_s, iq1, iq3_xxs, iq3_s };

struct Cell {
    uint32_t first : 22;   // index of its neighbors' words, the nearest first; for a grid point: its own number
    uint32_t count : 10;   // number of neighbors; 0 for a grid point
    uint32_t levels;       // in four dimensions: a byte for each, with a bit for each level that some neighbor has there
};

// A word is a point, encoded for table look-ups. Eight dimensions take four bits each: the level in the two low bits, and
// above them whether the dimension is odd. Four dimensions take a byte each, with the level in the high four bits.
struct Grid {
    const Cell *cells;       // by code: base 3 of eight digits, or base 8 of four
    const Cell *clear;       // the same in four dimensions, without neighbors that are dominated for all weights that
                             // round to the code; does not hold on the very edge between two levels
    const uint32_t *words;   // in eight dimensions every list begins at a multiple of 16 and is padded with words of no
                             // point; in four, lists follow each other, with 16 words of padding after the last
};

// Built by the first call, once per process; threads may call it at the same time.
const Grid &grid(GridName name);

constexpr int IQ2_CODES = 6561, IQ3_CODES = 4096;
