// The grids of the IQ1, IQ2 and IQ3 types: for every code that rounding can give, its place on the grid or its
// neighbours there.
#pragma once

#include <cstdint>

enum class GridName { iq2_xxs, iq2_xs, iq2_s, iq1, iq3_xxs, iq3_s };

struct Cell {
    uint32_t first : 22;   // of its neighbours' words, the nearest first; on the grid: its own, which is its number there
    uint32_t count : 10;   // of the neighbours; 0 on the grid
    uint32_t levels;       // in four dimensions: a byte for each, with a bit for each level that some neighbour has there
};

// A word is a point with its levels spelt out for table look-ups. Eight dimensions take four bits each, the level in the
// two low ones and above them whether the dimension is odd; four dimensions take a byte each, with
// the level in its high four.
struct Grid {
    const Cell *cells;       // by code: base 3 of eight digits, or base 8 of four
    const Cell *clear;       // the same in four dimensions, without neighbours that are beaten wherever a weight rounds to
                             // the code; but not on the very edge between two levels
    const uint32_t *words;   // in eight dimensions every list begins at a multiple of 16, and words of no
                             // point fill it up; in four they follow each other, and there are 16 words after the last
};

// Built by the first call, once for the life of the process, whoever calls.
const Grid &grid(GridName name);

constexpr int IQ2_CODES = 6561, IQ3_CODES = 4096;
