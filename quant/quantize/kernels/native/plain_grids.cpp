// Builds the tables of grids.h. ggml sorts the whole grid twice for each of 43,691 codes (iq2xs_init_impl), most of which
// rounding never produces. Here neighbors are found by counting sort: a distance is a small integer.
#include "grids.h"

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <new>
#include <vector>

#include "grid_points.h"

namespace {

constexpr uint32_t NOWHERE = 0x73737373;   // a word with the fourth level, which no point has
constexpr int FARTHEST = 4 * 49 + 1;   // four dimensions, seven levels apart; eight dimensions, two apart, is less

struct Shape {
    const char *points;
    int dimensions, base, codes;
    int shells;   // how many distinct distances, from the least on, neighbors may have
};

Shape shape(GridName name) {
    switch (name) {
        case GridName::iq2_xxs: return {IQ2_XXS_POINTS, 8, 3, IQ2_CODES, 2};
        case GridName::iq2_xs: return {IQ2_XS_POINTS, 8, 3, IQ2_CODES, 2};
        case GridName::iq2_s: return {IQ2_S_POINTS, 8, 3, IQ2_CODES, 1};
        case GridName::iq1: return {IQ1_POINTS, 8, 3, IQ2_CODES, 3};
        case GridName::iq3_xxs: return {IQ3_XXS_POINTS, 4, 8, IQ3_CODES, 2};
        case GridName::iq3_s: break;
    }
    return {IQ3_S_POINTS, 4, 8, IQ3_CODES, 3};
}

struct Tables {
    std::vector<Cell> cells, clear;
    std::vector<uint32_t> words;
    Grid grid;
};

uint32_t word_of(const Shape &s, int code) {
    uint32_t word = 0;
    for (int i = 0; i < s.dimensions; i++, code /= s.base) {
        const uint32_t level = static_cast<uint32_t>(code % s.base);
        word |= s.dimensions == 8 ? (level | (i & 1) << 2) << 4 * i : level << (8 * i + 4);
    }
    return word;
}

// The squared distance of every pair of half codes, each of half the dimensions.
std::vector<uint8_t> half_distances(const Shape &s, int half) {
    std::vector<uint8_t> table(static_cast<size_t>(half * half));
    for (int a = 0; a < half; a++) {
        for (int b = 0; b < half; b++) {
            int distance = 0;
            for (int u = a, v = b, i = 0; i < s.dimensions / 2; i++, u /= s.base, v /= s.base) {
                distance += (u % s.base - v % s.base) * (u % s.base - v % s.base);
            }
            table[static_cast<size_t>(a * half + b)] = static_cast<uint8_t>(distance);
        }
    }
    return table;
}

// Whether a point dominates another: in every dimension it is at least as near to all weights that round to the code,
// because its level is the code's, or is on the same side and not as far. Weights that round to a level lie between its
// two edges, and beyond the first and the last level without bound.
bool beats(const Shape &s, int code, int point, int other) {
    for (int i = 0; i < s.dimensions; i++, code /= s.base, point /= s.base, other /= s.base) {
        const int mine = point % s.base - code % s.base, its = other % s.base - code % s.base;
        if (mine != its && mine != 0 && !(mine * its > 0 && std::abs(mine) < std::abs(its))) return false;
    }
    return true;
}

uint32_t levels_bit(uint32_t word) {
    uint32_t levels = 0;
    for (int i = 0; i < 32; i += 8) levels |= 1u << (word >> (i + 4) & 7) << i;
    return levels;
}

// The list of a code without the points that an earlier one dominates: they can never be chosen.
Cell clear_cell(const Shape &s, const std::vector<int> &points, const std::vector<int> &list, int code, Tables &made,
                const std::vector<uint32_t> &words) {
    Cell cell = {static_cast<uint32_t>(made.words.size()) & 0x3fffff, 0, 0};
    for (size_t n = 0; n < list.size(); n++) {
        bool beaten = false;
        for (size_t m = 0; m < n && !beaten; m++) {
            beaten = beats(s, code, points[static_cast<size_t>(list[m])], points[static_cast<size_t>(list[n])]);
        }
        if (beaten) continue;
        made.words.push_back(words[static_cast<size_t>(list[n])]);
        cell.levels |= levels_bit(made.words.back());
        cell.count = (cell.count + 1) & 0x3ff;
    }
    return cell;
}

Tables *build(const Shape &s) {
    auto *const made = new Tables;
    std::vector<int> points;
    for (int code = 0; code < s.codes; code++) {
        if ((s.points[code / 6] - '0') >> code % 6 & 1) points.push_back(code);
    }
    const int half = s.dimensions == 8 ? 81 : 64;
    const std::vector<uint8_t> halves = half_distances(s, half);
    const size_t n = points.size();
    std::vector<uint8_t> low(n), high(n), distance(n);
    std::vector<uint32_t> words(n);
    for (size_t j = 0; j < n; j++) {
        low[j] = static_cast<uint8_t>(points[j] % half);
        high[j] = static_cast<uint8_t>(points[j] / half);
        words[j] = word_of(s, points[j]);
    }
    made->words = words;   // the points themselves, by number; every grid has a multiple of 16
    made->cells.resize(static_cast<size_t>(s.codes));
    made->clear.resize(made->cells.size());
    size_t on_grid = 0;
    for (int code = 0; code < s.codes; code++) {
        Cell &cell = made->cells[static_cast<size_t>(code)];
        if (on_grid < n && points[on_grid] == code) {
            cell.first = static_cast<uint32_t>(on_grid++) & 0x3fffff;
            made->clear[static_cast<size_t>(code)] = cell;
            continue;
        }
        cell.first = static_cast<uint32_t>(made->words.size()) & 0x3fffff;
        const uint8_t *const to_low = &halves[static_cast<size_t>(code % half * half)];
        const uint8_t *const to_high = &halves[static_cast<size_t>(code / half * half)];
        uint16_t at[FARTHEST] = {};
        for (size_t j = 0; j < n; j++) {
            distance[j] = static_cast<uint8_t>(to_low[low[j]] + to_high[high[j]]);
            at[distance[j]]++;
        }
        // From counts per distance to start offsets; points beyond the last shell are dropped.
        int farthest = 0, total = 0;
        for (int shells = 0; farthest < FARTHEST && shells < s.shells; farthest++) {
            const int here = at[farthest];
            at[farthest] = static_cast<uint16_t>(total);
            total += here;
            shells += here > 0;
        }
        made->words.resize(made->words.size() + static_cast<size_t>(total));
        for (size_t j = 0; j < n; j++) {
            if (distance[j] < farthest) made->words[cell.first + at[distance[j]]++] = words[j];
        }
        cell.count = static_cast<uint32_t>(total) & 0x3ff;
        if (s.dimensions == 4) {
            std::vector<int> list;
            for (uint32_t j = cell.first; j < made->words.size(); j++) {
                cell.levels |= levels_bit(made->words[j]);
                list.push_back(static_cast<int>(std::find(words.begin(), words.end(), made->words[j]) - words.begin()));
            }
            made->clear[static_cast<size_t>(code)] = clear_cell(s, points, list, code, *made, words);
        }
        if (s.dimensions == 8) made->words.resize((made->words.size() + 15) / 16 * 16, NOWHERE);
    }
    made->words.resize(made->words.size() + 16);
    // Whole vectors are loaded from the lists, in eight dimensions from aligned addresses.
    auto *const aligned = new (std::align_val_t(64)) uint32_t[made->words.size()];
    std::copy(made->words.begin(), made->words.end(), aligned);
    made->grid = {made->cells.data(), made->clear.data(), aligned};
    return made;
}

}  // namespace

const Grid &grid(GridName name) {
    // One static each, so a type's tables are built when that type is first used.
    switch (name) {
        case GridName::iq2_xxs: { static const Tables *const made = build(shape(name)); return made->grid; }
        case GridName::iq2_xs: { static const Tables *const made = build(shape(name)); return made->grid; }
        case GridName::iq2_s: { static const Tables *const made = build(shape(name)); return made->grid; }
        case GridName::iq1: { static const Tables *const made = build(shape(name)); return made->grid; }
        case GridName::iq3_xxs: { static const Tables *const made = build(shape(name)); return made->grid; }
        case GridName::iq3_s: break;
    }
    static const Tables *const made = build(shape(GridName::iq3_s));
    return made->grid;
}

// For tests: writes the numbers of the points in a code's list. For a code that is a grid point itself it writes -1 minus
// its number. Returns how many; `to` has room for all points of the grid.
extern "C" __attribute__((visibility("default"))) int quant_grid(int name, int code, int32_t *to) {
    const Grid &g = grid(static_cast<GridName>(name));
    const Cell &cell = g.cells[code];
    if (!cell.count) {
        *to = -1 - static_cast<int32_t>(cell.first);
        return 1;
    }
    for (uint32_t j = 0; j < cell.count; j++) {
        // The words begin with all points, in the order of their numbers.
        const uint32_t *const word = g.words + cell.first + j;
        to[j] = static_cast<int32_t>(std::find(g.words, word, *word) - g.words);
    }
    return static_cast<int>(cell.count);
}
