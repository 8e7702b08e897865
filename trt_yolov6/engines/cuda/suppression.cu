// Greedy non-maximum suppression within each class, of a whole batch, from a detector's raw outputs.
//
// `find` writes a 64-bit key of every score above the threshold: the score's bits, inverted, above the place of the
// score, so that ascending keys are descending scores, and equal scores go by their place, as on the CPU. `suppress`,
// one block an image, takes the keys from the smallest up in chunks, sorts a chunk in shared memory, and goes through
// it in tiles: which of a tile's boxes does a kept one suppress, which of them suppress each other, which remain. It
// ends as soon as enough boxes are kept, so most candidates are never sorted. Of few images, which would leave most of
// the GPU idle, the first chunk is sorted by `rank` and compared by `compare`, each of many blocks.
//
// Compiled by `suppression.py`, with the shape and the layout of the outputs as macros and without fused
// multiply-adds: the arithmetic is that of `detectors.overlap.iou`, in float64 wherever float32 could decide otherwise.

typedef unsigned int u32;
typedef unsigned long long u64;

#ifndef THREADS  // the tests have fewer
#define LOG_THREADS 10
#define THREADS (1 << LOG_THREADS)
#define TILE 128
#endif
#define CHUNK (2 * THREADS)
#define WORDS (TILE / 32)
#define WARPS (THREADS / 32)
#define SUBSETS (THREADS / TILE)
#define ALL 0xffffffffu

// A kernel may be launched before the one before it has ended (see `Kernels.launch`): it waits for it here. Each lets the
// next one be launched when it begins.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define LET_NEXT_BEGIN() asm volatile("griddepcontrol.launch_dependents;" ::: "memory")
#define WAIT_FOR_LAST() asm volatile("griddepcontrol.wait;" ::: "memory")
#else
#define LET_NEXT_BEGIN()
#define WAIT_FOR_LAST()
#endif

#ifndef RANK_BLOCKS  // the tests have fewer
#define RANK_BLOCKS 16
#define COMPARE_THREADS 128
#define AT_HAND 8
#endif
#define RANKS (CHUNK / RANK_BLOCKS)
#define MOST_OF_RANK 256
#define AT_ONCE 8

// --- outputs ---------------------------------------------------------------------------------------------------------

// Element (anchor, class) of an image's scores lies at anchor * SCORE_ANCHOR + class * SCORE_CLASS + SCORE_FIRST, side
// k of an anchor's box at anchor * BOX_ANCHOR + k * BOX_SIDE + BOX_FIRST.

#ifndef ON_CPU  // the tests bring their own
__device__ __forceinline__ float of_half(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
#endif

#ifdef HALF_SCORES
typedef unsigned short Score;
__device__ __forceinline__ float score_value(Score bits) { return of_half(bits); }
#else
typedef float Score;
__device__ __forceinline__ float score_value(Score value) { return value; }
#endif

#ifdef HALF_BOXES
typedef unsigned short Side;
__device__ __forceinline__ float side_value(Side bits) { return of_half(bits); }
#else
typedef float Side;
__device__ __forceinline__ float side_value(Side value) { return value; }
#endif

struct Outputs {
    const Score* scores;
    const Side* boxes;
#ifdef LEVELS
    const Score* levels[3];
#endif
};

__device__ __forceinline__ float sigmoid(float value) { return (float)(1.0 / (1.0 + exp(-(double)value))); }

#ifdef LEVELS
// YOLOv5 and v7: three outputs (batch, 3, rows, columns, 5 + classes). LEVELS has a row each: rows, columns, stride in
// y and x, and three pairs of an anchor's width and height.
struct Level { int rows, columns; double stride_y, stride_x, sides[3][2]; };
__device__ const Level LEVEL[3] = LEVELS;

// Returns the row of 5 + classes numbers of an anchor, and where it is.
__device__ const Score* anchor_row(const Outputs& outputs, u32 image, u32 anchor, const Level** level, u32* shape, u32* cell) {
    for (int index = 0;; ++index) {
        u32 cells = LEVEL[index].rows * LEVEL[index].columns;
        if (anchor < 3 * cells || index == 2) {
            *level = &LEVEL[index];
            *shape = anchor / cells;
            *cell = anchor % cells;
            return outputs.levels[index] + ((u64)image * 3 * cells + anchor) * (5 + CLASSES);
        }
        anchor -= 3 * cells;
    }
}
#endif

// Returns a score as the CPU's reader of the layout computes it, or 0 where it cannot exceed the threshold.
__device__ __forceinline__ float read_score(const Outputs& outputs, u32 image, u32 anchor, u32 label, float least) {
#ifdef LEVELS
    const Level* level;
    u32 shape, cell;
    const Score* row = anchor_row(outputs, image, anchor, &level, &shape, &cell);
    float object = score_value(row[4]), score = score_value(row[5 + label]);
    // A product of two sigmoids exceeds what neither of its factors does; most end here, without an exponential.
    if (!(object > least && score > least)) return 0;
    return sigmoid(score) * sigmoid(object);
#else
    const Score* scores = outputs.scores + (u64)image * SCORE_IMAGE;
    float score = score_value(scores[anchor * SCORE_ANCHOR + label * SCORE_CLASS + SCORE_FIRST]);
#ifdef OBJECTNESS
    score *= score_value(scores[anchor * SCORE_ANCHOR + OBJECTNESS]);
#endif
    return score;
#endif
}

// Four numbers of a box as they lie in the output.
struct Raw { float side[4]; };

__device__ __forceinline__ Raw read_box(const Outputs& outputs, u32 image, u32 anchor) {
    Raw raw;
#ifdef LEVELS
    const Level* level;
    u32 shape, cell;
    const Score* row = anchor_row(outputs, image, anchor, &level, &shape, &cell);
    for (int k = 0; k < 4; ++k) raw.side[k] = score_value(row[k]);
#else
    const Side* boxes = outputs.boxes + (u64)image * BOX_IMAGE + anchor * BOX_ANCHOR + BOX_FIRST;
    for (int k = 0; k < 4; ++k) raw.side[k] = side_value(boxes[k * BOX_SIDE]);
#endif
    return raw;
}

// Returns x1, y1, x2, y2, computed in float64 and rounded once.
__device__ __forceinline__ float4 corners(const Outputs& outputs, Raw raw, u32 anchor) {
#if defined(CENTRES) || defined(CELLS) || defined(LEVELS)
    double x = raw.side[0], y = raw.side[1], half_width, half_height;
#ifdef LEVELS
    const Level* level;
    u32 shape, cell;
    anchor_row(outputs, 0, anchor, &level, &shape, &cell);
    double said[4];
    for (int k = 0; k < 4; ++k) said[k] = 2 * (1.0 / (1.0 + exp(-(double)raw.side[k])));
    x = (said[0] - 0.5 + cell % level->columns) * level->stride_x;
    y = (said[1] - 0.5 + cell / level->columns) * level->stride_y;
    half_width = said[2] * said[2] * level->sides[shape][0] / 2;
    half_height = said[3] * said[3] * level->sides[shape][1] / 2;
#elif defined(CELLS)
    // YOLOX. CELLS has a row a level: its first anchor, columns and stride.
    const int levels[][3] = CELLS;
    int index = 0;
    while (index + 1 < (int)(sizeof(levels) / sizeof(levels[0])) && anchor >= (u32)levels[index + 1][0]) ++index;
    u32 cell = anchor - levels[index][0];
    double stride = levels[index][2];
    x = (x + cell % levels[index][1]) * stride;
    y = (y + cell / levels[index][1]) * stride;
    half_width = exp((double)raw.side[2]) * stride / 2;
    half_height = exp((double)raw.side[3]) * stride / 2;
#else
    half_width = (double)raw.side[2] / 2;
    half_height = (double)raw.side[3] / 2;
#endif
    return make_float4(
        (float)(x - half_width), (float)(y - half_height), (float)(x + half_width), (float)(y + half_height));
#else
    return make_float4(raw.side[0], raw.side[1], raw.side[2], raw.side[3]);
#endif
}

__device__ __forceinline__ Outputs outputs_at(const void* first, const void* second, const void* third) {
    Outputs outputs;
    outputs.scores = (const Score*)first;
    outputs.boxes = (const Side*)second;
#ifdef LEVELS
    outputs.levels[0] = (const Score*)first;
    outputs.levels[1] = (const Score*)second;
    outputs.levels[2] = (const Score*)third;
#endif
    return outputs;
}

// --- candidates ------------------------------------------------------------------------------------------------------

#ifndef FIND_THREADS
#define FIND_THREADS 256
#define FIND_EACH 8
#endif

__device__ __forceinline__ u64 key_of(float score, u32 place) {
    return (u64)(ALL - __float_as_uint(score)) << 32 | place;
}

// Grid: (blocks of FIND_THREADS * FIND_EACH scores, images). `counts`, zero before, may end above the capacity;
// `suppress` leaves them at zero.
extern "C" __global__ void __launch_bounds__(FIND_THREADS) find(
    const void* first, const void* second, const void* third,
    float threshold, float least, u32 capacity, u32* counts, u64* keys)
{
    __shared__ u64 found[FIND_THREADS * FIND_EACH];
    __shared__ u32 count, base;
    LET_NEXT_BEGIN();
    const Outputs outputs = outputs_at(first, second, third);
    const u32 image = blockIdx.y, begin = blockIdx.x * (FIND_THREADS * FIND_EACH) + threadIdx.x;
    if (threadIdx.x == 0) count = 0;
    __syncthreads();
    float scores[FIND_EACH];
    u32 places[FIND_EACH];
#pragma unroll
    for (int k = 0; k < FIND_EACH; ++k) {
        // In the order of memory, so that a warp reads neighbours.
        u32 element = begin + k * FIND_THREADS;
#ifdef CLASS_BY_CLASS
        u32 anchor = element % ANCHORS, label = element / ANCHORS;
#else
        u32 anchor = element / CLASSES, label = element % CLASSES;
#endif
        places[k] = anchor * CLASSES + label;
        scores[k] = element < ANCHORS * CLASSES ? read_score(outputs, image, anchor, label, least) : 0;
    }
#pragma unroll
    for (int k = 0; k < FIND_EACH; ++k)
        if (scores[k] > threshold) found[atomicAdd(&count, 1u)] = key_of(scores[k], places[k]);
    __syncthreads();
    const u32 mine = count;
    if (mine == 0) return;
    if (threadIdx.x == 0) base = atomicAdd(&counts[image], mine);
    __syncthreads();
    for (u32 i = threadIdx.x; i < mine; i += FIND_THREADS)
        if (base + i < capacity) keys[(u64)image * capacity + base + i] = found[i];
}

// --- suppression -----------------------------------------------------------------------------------------------------

// Results of an image: a header, `limit` boxes, labels and scores, and what makes the next one's boxes aligned.
struct Header { u32 kept, found, unused[2]; };

// An image of the batch, as letterbox.cu's kernel is told of it.
struct Picture {
    const unsigned char* pixels;
    long long row_step, column_step;
    int height, width, top, left, resized_height, resized_width, method, channel_step;
};

// Returns a place on an axis of the input as one of the image, as `data.letterbox.to_sources` does.
__device__ __forceinline__ float to_source(float place, int first, int resized, int length, bool clip) {
    const double least = clip ? 0 : -3.402823466e38f, most = clip ? length : 3.402823466e38f;
    const double mapped = ((double)place - first) * ((double)length / resized);
    return (float)(mapped < least ? least : mapped > most ? most : mapped);
}

#define GRID 10  // at most 16, see `mark`
#define CELLS_OF_IMAGE (GRID * GRID)

// Boxes in shared memory, and what is compared of them. A bit of `near` says of a kept box and a cell of the image
// whether boxes with their centre in the cell can overlap that box by more than the threshold.
struct Kept {
    float4 box[MAX_KEPT];
    float area[MAX_KEPT], score[MAX_KEPT];
    u32 label[MAX_KEPT], near[MAX_KEPT / 32][CELLS_OF_IMAGE];
};
struct Tile {
    float4 box[TILE];
    float area[TILE], score[TILE];
    u32 label[TILE], cell[TILE], better[TILE][WORDS];  // the better ones of the tile that overlap it
};

// An IoU, what is surely below and above it in float32, and (1 - it) / (2 it), rounded up.
struct Threshold { float low, high, reach; double exact; };

// Returns the column or row of cells of a place on an axis of the image; never falls as places rise.
__device__ __forceinline__ u32 cell_at(float place, float length) {
    return (u32)fminf(fmaxf(place * (GRID / length), 0.0f), GRID - 1.0f);
}

__device__ __forceinline__ u32 cell_of(float4 box) {
    return GRID * cell_at(0.5f * box.y + 0.5f * box.w, HEIGHT) + cell_at(0.5f * box.x + 0.5f * box.z, WIDTH);
}

// Returns the distance on an axis within which the centres of boxes lie that overlap one that spans low to high there:
// starts and ends are, together, at most (1 - IoU) / IoU of its side apart (see `detectors.suppression`).
__device__ __forceinline__ float reach_of(float low, float high, Threshold threshold) {
    return threshold.reach * (high - low) + 1e-6f * (fabsf(low) + fabsf(high));
}

// Marks the cells that a kept box is near to; a warp does it together.
__device__ void mark(Kept& kept, u32 index, float4 box, Threshold threshold, u32 lane) {
    const float x = 0.5f * box.x + 0.5f * box.z, y = 0.5f * box.y + 0.5f * box.w;
    const float reach_x = reach_of(box.x, box.z, threshold), reach_y = reach_of(box.y, box.w, threshold);
    const u32 left = cell_at(x - reach_x, WIDTH), right = cell_at(x + reach_x, WIDTH);
    const u32 top = cell_at(y - reach_y, HEIGHT), bottom = cell_at(y + reach_y, HEIGHT);
    const u32 column = left + lane % 16;
    for (u32 row = top + lane / 16; row <= bottom && column <= right; row += 2)
        atomicOr(&kept.near[index / 32][GRID * row + column], 1u << index % 32);
}

// Returns whether the IoU of two boxes exceeds the threshold.
__device__ __forceinline__ bool overlap(float4 a, float area_a, float4 b, float area_b, Threshold threshold) {
    float width = fminf(a.z, b.z) - fmaxf(a.x, b.x), height = fminf(a.w, b.w) - fmaxf(a.y, b.y);
    if (!(width > 0 && height > 0)) return false;  // so a box without area overlaps nothing
    // In float32 both sides are right to 2e-6 where nothing over- or underflows; the thresholds are 1e-5 apart.
    float shared = width * height, united = area_a + area_b - shared;
    if (united > 1e-30f && united < 1e30f) {
        if (shared < threshold.low * united) return false;
        if (shared > threshold.high * united) return true;
    }
    double both = ((double)fminf(a.z, b.z) - fmaxf(a.x, b.x)) * ((double)fminf(a.w, b.w) - fmaxf(a.y, b.y));
    double first = ((double)a.z - a.x) * ((double)a.w - a.y), second = ((double)b.z - b.x) * ((double)b.w - b.y);
    return both / (first + second - both) > threshold.exact;
}

// Returns the sum of what the warps before have, each one number, and of all; barriers must lie between two calls.
__device__ u32 sum_before(u32 own, u32* totals, u32* all) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (lane == 0) totals[warp] = own;
    __syncthreads();
    u32 sum = lane < WARPS ? totals[lane] : 0;
    for (int step = 1; step < WARPS; step *= 2) {
        u32 other = __shfl_up_sync(ALL, sum, step);
        if (lane >= step) sum += other;
    }
    *all = __shfl_sync(ALL, sum, WARPS - 1);
    const u32 before = __shfl_sync(ALL, sum, warp ? warp - 1 : 0);
    return warp ? before : 0;
}

// Adds up what the threads have; returns the sum of those before a thread and of itself.
__device__ u32 sum_up_to(u32 own, u32* totals) {
    const u32 lane = threadIdx.x % 32;
    for (int step = 1; step < 32; step *= 2) {
        u32 other = __shfl_up_sync(ALL, own, step);
        if (lane >= step) own += other;
    }
    u32 all;
    return own + sum_before(__shfl_sync(ALL, own, 31), totals, &all);
}

// Sorts `size` keys of [start, end), at most CHUNK: by bins of about equal width first, then within them.
__device__ void sort(u64* keys, u32 size, u64 start, u64 end, u32* bins, u32* totals) {
    const u32 thread = threadIdx.x;
    const u64 one = key_of(1.0f, 0), low = start == 0 && one < end ? one : start;  // see `chunk_end`
    const int bits = 64 - __clzll(end - low - 1), shift = bits > LOG_THREADS ? bits - LOG_THREADS : 0;
    u64 mine[2];
    u32 bin[2], slot[2];
    bins[thread] = 0;
    __syncthreads();
#pragma unroll
    for (int k = 0; k < 2; ++k)
        if (thread + k * THREADS < size) {
            mine[k] = keys[thread + k * THREADS];
            bin[k] = mine[k] < low ? 0 : (u32)((mine[k] - low) >> shift);
            slot[k] = atomicAdd(&bins[bin[k]], 1u);
        }
    __syncthreads();
    const u32 own = bins[thread], sum = sum_up_to(own, totals);
    bins[thread] = sum - own;
    __syncthreads();
#pragma unroll
    for (int k = 0; k < 2; ++k)
        if (thread + k * THREADS < size) keys[bins[bin[k]] + slot[k]] = mine[k];
    __syncthreads();
    u32 place[2];
#pragma unroll
    for (int k = 0; k < 2; ++k)
        if (thread + k * THREADS < size) {
            const u32 first = bins[bin[k]], last = bin[k] + 1 < THREADS ? bins[bin[k] + 1] : size;
            place[k] = first;
            for (u32 other = first; other < last; ++other) place[k] += keys[other] < mine[k];
        }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < 2; ++k)
        if (thread + k * THREADS < size) keys[place[k]] = mine[k];
    __syncthreads();
}

// Returns a key such that some, and at most CHUNK, of an image's keys lie in [start, it).
__device__ u64 chunk_end(const u64* keys, u32 count, u64 start, u64 stop, u32* bins, u32* totals) {
    __shared__ u32 split, before;
    const u32 thread = threadIdx.x;
    // Scores are hardly above 1, so bins begin there; what is above falls into the first one.
    const u64 one = key_of(1.0f, 0);
    bool is_open = start == 0 && one < stop;
    u64 low = is_open ? one : start, high = stop;
    for (;;) {
        const int bits = 64 - __clzll(high - low - 1), shift = bits > LOG_THREADS ? bits - LOG_THREADS : 0;
        bins[thread] = 0;
        if (thread == 0) split = THREADS;
        __syncthreads();
        for (u32 i = thread; i < count; i += THREADS) {
            u64 key = keys[i];
            if (key >= start && key < high) atomicAdd(&bins[key < low ? 0 : (key - low) >> shift], 1u);
        }
        __syncthreads();
        const u32 own = bins[thread];
        const u32 sum = sum_up_to(own, totals);
        if (sum > CHUNK && sum - own <= CHUNK) {
            split = thread;
            before = sum - own;
        }
        __syncthreads();
        const u32 bin = split, smaller = before;
        if (bin == THREADS) return high;
        if (smaller > 0) return low + ((u64)bin << shift);
        // One bin has too many: the same again within it.
        const u64 begin = low + ((u64)bin << shift);
        if (high - begin > 1ull << shift) high = begin + (1ull << shift);
        low = is_open && bin == 0 ? start : begin;
        is_open = false;
        __syncthreads();
    }
}

// Returns whether one of the kept boxes from a word of their bits on, and every `step`-th word after it, suppresses a box.
__device__ __forceinline__ bool is_suppressed(
    const Kept& kept, u32 total, u32 word, u32 step, float4 box, float area, u32 label, u32 cell, Threshold threshold)
{
    bool out = false;
    for (; 32 * word < total && !out; word += step)
        for (u32 bits = kept.near[word][cell]; bits && !out; bits &= bits - 1) {
            u32 other = 32 * word + __ffs(bits) - 1;
            if (label == kept.label[other]) out = overlap(box, area, kept.box[other], kept.area[other], threshold);
        }
    return out;
}

// Leaves out of `count` keys those whose boxes a kept one suppresses; returns how many are left, in order.
__device__ u32 drop_suppressed(
    const Outputs& outputs, u32 image, u64* keys, u32 count, const Kept& kept, u32 total, Threshold threshold, u32* totals)
{
    const u32 thread = threadIdx.x, lane = thread % 32;
    u32 left = 0;
    for (u32 base = 0; base < count; base += THREADS) {
        u64 key = 0;
        bool stays = base + thread < count;
        if (stays) {
            key = keys[base + thread];
            const u32 anchor = (u32)key / CLASSES;
            const float4 box = corners(outputs, read_box(outputs, image, anchor), anchor);
            const float area = (box.z - box.x) * (box.w - box.y);
            stays = !is_suppressed(kept, total, 0, 1, box, area, (u32)key % CLASSES, cell_of(box), threshold);
        }
        const u32 votes = __ballot_sync(ALL, stays);
        u32 all;
        const u32 place = left + sum_before(__popc(votes), totals, &all) + __popc(votes & ((1u << lane) - 1));
        if (stays) keys[place] = key;  // all have read theirs, and the next ones lie after it
        left += all;
        __syncthreads();
    }
    return left;
}

// --- the best candidates of few images, by many blocks ------------------------------------------------------------------

// The best candidates of an image, in order. Bit w of words[i] says that some of the candidates from 32 w on are better
// than the i-th and overlap it; bit b of better[w][i], which is undefined otherwise, that candidate 32 w + b is one of
// them. Of none, `suppress` sorts them itself.
struct Ranked {
    u32 count, unused[3];
    float4 box[CHUNK];
    u64 key[CHUNK], words[CHUNK];
    u32 better[CHUNK / 32][CHUNK];
};

// Reads keys at a step of THREADS, all at the same time; beyond the last they are ~0.
__device__ __forceinline__ void load_keys(u64 (&some)[AT_ONCE], const u64* keys, u32 first, u32 count) {
#pragma unroll
    for (int k = 0; k < AT_ONCE; ++k) some[k] = first + k * THREADS < count ? keys[first + k * THREADS] : ~0ull;
}

// Grid: (RANK_BLOCKS, images). Each block counts all keys by bins, and sorts those of its share of the ranks.
extern "C" __global__ void __launch_bounds__(THREADS) rank(
    const void* first, const void* second, const void* third,
    float confidence, u32 capacity, const u32* counts, const u64* all_keys, Ranked* all_ranked)
{
    __shared__ u64 list[RANKS + MOST_OF_RANK];
    __shared__ u32 bins[2 * THREADS + 1], taken[RANKS], totals[WARPS], is_full;
    const Outputs outputs = outputs_at(first, second, third);
    const u32 thread = threadIdx.x, image = blockIdx.y, begin = blockIdx.x * RANKS;
    const u64* keys = all_keys + (u64)image * capacity;
    Ranked& ranked = all_ranked[image];
    LET_NEXT_BEGIN();
    for (u32 i = thread; i < 2 * THREADS; i += THREADS) bins[i] = 0;
    for (u32 i = thread; i < RANKS; i += THREADS) taken[i] = 0;
    for (u32 i = thread; i < RANKS + MOST_OF_RANK; i += THREADS) list[i] = ~0ull;
    if (thread == 0) is_full = 0;
    WAIT_FOR_LAST();
    // Read together with their number: one way to memory instead of two.
    u64 some[AT_ONCE];
    load_keys(some, keys, thread, capacity);
    const u32 found = counts[image], count = found > capacity ? 0 : found;
#pragma unroll
    for (int k = 0; k < AT_ONCE; ++k)
        if (thread + k * THREADS >= count) some[k] = ~0ull;
    if (begin >= count) {
        if (begin == 0 && thread == 0) ranked.count = 0;
        return;
    }
    const u64 one = key_of(1.0f, 0), stop = key_of(confidence, 0), low = one < stop ? one : 0;  // see `chunk_end`
    const int bits = 64 - __clzll(stop - low - 1), shift = bits > LOG_THREADS + 1 ? bits - LOG_THREADS - 1 : 0;
    __syncthreads();
    for (u32 i = thread; i < count; i += AT_ONCE * THREADS) {
        if (i >= AT_ONCE * THREADS) load_keys(some, keys, i, count);
        for (u64 key : some)
            if (key != ~0ull) atomicAdd(&bins[key < low ? 0 : (key - low) >> shift], 1u);
    }
    __syncthreads();
    const u32 even = bins[2 * thread], odd = bins[2 * thread + 1], before = sum_up_to(even + odd, totals) - even - odd;
    if (before < CHUNK && (even > MOST_OF_RANK || odd > MOST_OF_RANK)) is_full = 1;
    bins[2 * thread] = before;
    bins[2 * thread + 1] = before + even;
    if (thread == 0) bins[2 * THREADS] = count;
    __syncthreads();
    if (begin == 0 && thread == 0) ranked.count = is_full ? 0 : count < CHUNK ? count : CHUNK;
    if (is_full) return;
    for (u32 i = thread; i < count; i += AT_ONCE * THREADS) {
        if (count > AT_ONCE * THREADS) load_keys(some, keys, i, count);
        for (u64 key : some) {
            const u32 place = key == ~0ull ? RANKS : bins[key < low ? 0 : (key - low) >> shift] - begin;
            if (place < RANKS) list[place + atomicAdd(&taken[place], 1u)] = key;
        }
    }
    __syncthreads();
    for (u32 i = thread; i < RANKS + MOST_OF_RANK; i += THREADS) {
        const u64 key = list[i];
        if (key == ~0ull) continue;
        const u32 bin = key < low ? 0 : (key - low) >> shift, last = bins[bin + 1] - begin;
        u32 place = bins[bin];
        for (u32 other = place - begin; other < last; ++other) place += list[other] < key;
        if (place >= CHUNK) continue;
        ranked.key[place] = key;
        ranked.words[place] = 0;
        ranked.box[place] = corners(outputs, read_box(outputs, image, (u32)key / CLASSES), (u32)key / CLASSES);
    }
}

// Returns a part of a box's area such that no two boxes that share less than the sum of theirs overlap; NaN where float32
// does not tell.
__device__ __forceinline__ float part_of(float area, float low) {
    return area > 1e-30f && area < 1e30f ? low / (1 + low) * area : __uint_as_float(0x7fffffff);
}

// Grid: ((CHUNK + COMPARE_THREADS) / 32, CHUNK / COMPARE_THREADS / 2, images). A block compares COMPARE_THREADS candidates
// with 32 better ones; the y-th row of blocks has the y-th such group from the start, and the y-th from the end.
extern "C" __global__ void __launch_bounds__(COMPARE_THREADS) compare(
    double iou, float low, float high, float reach, Ranked* all_ranked)
{
    __shared__ float4 boxes[32];
    __shared__ float parts[32];
    __shared__ u32 labels[32];
    const Threshold threshold = {low, high, reach, iou};
    Ranked& ranked = all_ranked[blockIdx.z];
    const u32 split = (blockIdx.y + 1) * (COMPARE_THREADS / 32), is_first = blockIdx.x < split, thread = threadIdx.x;
    const u32 word = is_first ? blockIdx.x : blockIdx.x - split;
    const u32 group = is_first ? blockIdx.y : CHUNK / COMPARE_THREADS - 1 - blockIdx.y;
    const u32 begin = group * COMPARE_THREADS, row = begin + thread;
    LET_NEXT_BEGIN();
    WAIT_FOR_LAST();
    // Read together with their number: one way to memory instead of two.
    const float4 box = ranked.box[row];
    const u32 label = (u32)ranked.key[row] % CLASSES;
    if (thread < 32) {
        const float4 one = ranked.box[32 * word + thread];
        boxes[thread] = one;
        parts[thread] = part_of((one.z - one.x) * (one.w - one.y), low);
        labels[thread] = (u32)ranked.key[32 * word + thread] % CLASSES;
    }
    if (begin >= ranked.count) return;
    __syncthreads();
    const float area = (box.z - box.x) * (box.w - box.y), part = part_of(area, low);
    u32 near = 0, better = 0;
#pragma unroll 16
    for (u32 k = 0; k < 32; ++k) {
        const float4 one = boxes[k];
        const float width = fmaxf(fminf(box.z, one.z) - fmaxf(box.x, one.x), 0);
        const float height = fminf(box.w, one.w) - fmaxf(box.y, one.y);
        near |= (u32)!(width * height < part + parts[k]) << k;
    }
    if (row < 32 * word + 32) near &= row <= 32 * word ? 0 : (1u << (row - 32 * word)) - 1;
    for (; near; near &= near - 1) {
        const u32 k = __ffs(near) - 1;
        const float4 one = boxes[k];
        if (label == labels[k] && overlap(box, area, one, (one.z - one.x) * (one.w - one.y), threshold)) better |= 1u << k;
    }
    if (!better) return;
    ranked.better[word][row] = better;
    atomicOr(&ranked.words[row], 1ull << word);
}

// A candidate that is not decided on, and AT_HAND of the words of those that are better and overlap it.
struct Row {
    u64 words;  // the next ones
    u32 better[AT_HAND], word[AT_HAND];
};

__device__ __forceinline__ void load(Row& row, const Ranked& ranked, u32 place) {
#pragma unroll
    for (u32 k = 0; k < AT_HAND; ++k) {
        row.word[k] = row.words ? __ffsll(row.words) - 1 : 0;
        row.better[k] = row.words ? ranked.better[row.word[k]][place] : 0;
        row.words &= row.words - 1;
    }
}

// Says of a warp's candidates whether they are not decided on, and whether they are kept.
__device__ __forceinline__ void publish(volatile u64* state, bool is_open, bool is_kept) {
    const u32 opens = __ballot_sync(ALL, is_open), keeps = __ballot_sync(ALL, is_kept);
    if (threadIdx.x % 32 == 0) *state = (u64)keeps << 32 | opens;
}

// Keeps those of the best candidates that no kept one suppresses; returns how many, at most `limit`.
//
// All are decided on at the same time, two a thread. One is kept as soon as all better ones that overlap it are known to be
// suppressed, and suppressed as soon as one of them is kept; warps take turns at nothing but a barrier.
__device__ u32 keep_ranked(const Ranked& ranked, u32 limit, Kept& kept, u32* totals) {
    __shared__ volatile u64 state[CHUNK / 32];  // of 32 candidates each, see `publish`
    const u32 thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    Row rows[2];
    float4 boxes[2];
    bool is_open[2], is_kept[2];
#pragma unroll
    for (u32 k = 0; k < 2; ++k) {  // together with their number
        boxes[k] = ranked.box[thread + k * THREADS];
        rows[k].words = ranked.words[thread + k * THREADS];
    }
    const u32 count = ranked.count;
#pragma unroll
    for (u32 k = 0; k < 2; ++k) {
        const float4 box = boxes[k];
        is_open[k] = thread + k * THREADS < count
            && fabsf(box.x) <= 3.402823466e38f && fabsf(box.y) <= 3.402823466e38f
            && fabsf(box.z) <= 3.402823466e38f && fabsf(box.w) <= 3.402823466e38f;
        is_kept[k] = is_open[k] && !rows[k].words;
        is_open[k] = is_open[k] && !is_kept[k];
        if (is_open[k]) load(rows[k], ranked, thread + k * THREADS);
        publish(state + warp + k * WARPS, is_open[k], is_kept[k]);
    }
    while (__syncthreads_or(is_open[0] || is_open[1])) {
#pragma unroll
        for (u32 k = 0; k < 2; ++k) {
            while (is_open[k]) {
                u32 open = 0, keeping = 0;
#pragma unroll
                for (u32 j = 0; j < AT_HAND; ++j) {
                    u32& better = rows[k].better[j];
                    const u64 now = better ? state[rows[k].word[j]] : 0;
                    keeping |= (u32)(now >> 32) & better;
                    open |= better &= (u32)now;  // the suppressed ones do not matter any more
                }
                if (keeping) is_open[k] = false;
                else if (open) break;
                else if (rows[k].words) load(rows[k], ranked, thread + k * THREADS);
                else {
                    is_open[k] = false;
                    is_kept[k] = true;
                }
            }
            publish(state + warp + k * WARPS, is_open[k], is_kept[k]);
        }
    }
    u32 mine[2], all;
#pragma unroll
    for (u32 k = 0; k < 2; ++k) mine[k] = state[warp + k * WARPS] >> 32;
    const u32 before = sum_before(__popc(mine[1]) << 16 | __popc(mine[0]), totals, &all);
    const u32 first[2] = {before & 0xffff, (all & 0xffff) + (before >> 16)}, total = (all & 0xffff) + (all >> 16);
#pragma unroll
    for (u32 k = 0; k < 2; ++k) {
        const u32 to = first[k] + __popc(mine[k] & ((1u << lane) - 1));
        if (!is_kept[k] || to >= limit) continue;
        const u64 key = ranked.key[thread + k * THREADS];
        kept.box[to] = boxes[k];
        kept.area[to] = (boxes[k].z - boxes[k].x) * (boxes[k].w - boxes[k].y);
        kept.score[to] = __uint_as_float(ALL - (u32)(key >> 32));
        kept.label[to] = (u32)key % CLASSES;
    }
    __syncthreads();
    return total < limit ? total : limit;
}

// Grid: (images). With `ranked`, the best candidates have been compared. With `pictures`, boxes are mapped to them; with
// `clip`, they are cut off at the pictures' borders, and those with nothing inside are left out.
extern "C" __global__ void __launch_bounds__(THREADS) suppress(
    const void* first, const void* second, const void* third,
    float confidence, double iou, float low, float high, float reach, u32 limit, u32 capacity,
    u32* counts, const u64* all_keys, const Ranked* ranked, const Picture* pictures, u32 clip, unsigned char* results)
{
    __shared__ u64 sorted[CHUNK];
    __shared__ Kept kept;
    __shared__ union { Tile tile; u32 bins[THREADS]; } scratch;
    __shared__ u32 length, suppressed[WORDS], valid[WORDS], alive[TILE], chosen[TILE], added, totals[WARPS];
    __shared__ Picture picture;
    const Outputs outputs = outputs_at(first, second, third);
    const Threshold threshold = {low, high, reach, iou};
    Tile& tile = scratch.tile;
    const u32 thread = threadIdx.x, lane = thread % 32, warp = thread / 32, image = blockIdx.x;
    for (u32 i = thread; i < MAX_KEPT / 32 * CELLS_OF_IMAGE; i += THREADS) (&kept.near[0][0])[i] = 0;
    if (thread == 0 && pictures) picture = pictures[image];  // written before the engine began
    WAIT_FOR_LAST();
    const u32 found = counts[image];
    const u64* keys = all_keys + (u64)image * capacity;
    const u32 count = found > capacity ? 0 : found;  // the host sees it, and takes the outputs whole
    const u64 stop = key_of(confidence, 0);
    u64 start = 0;
    u32 total = 0, seen = 0;
    bool is_crowded = false;  // kept boxes suppressed most of the last tile
    if (ranked) {
        total = keep_ranked(ranked[image], limit, kept, totals);
        seen = ranked[image].count;
        is_crowded = 2 * total <= seen;
        if (seen && seen < count && total < limit) {
            start = ranked[image].key[seen - 1] + 1;
            for (u32 index = warp; index < total; index += WARPS) mark(kept, index, kept.box[index], threshold, lane);
        }
    }
    __syncthreads();
    while (seen < count && total < limit) {
        const u64 end = count <= CHUNK ? stop : chunk_end(keys, count, start, stop, scratch.bins, totals);
        if (thread == 0) length = 0;
        __syncthreads();
        for (u32 base = 0; base < count; base += THREADS) {
            u64 key = base + thread < count ? keys[base + thread] : ~0ull;
            bool inside = key >= start && key < end;
            u32 votes = __ballot_sync(ALL, inside), slot = 0;
            if (lane == 0 && votes) slot = atomicAdd(&length, (u32)__popc(votes));
            slot = __shfl_sync(ALL, slot, 0);
            if (inside) sorted[slot + __popc(votes & ((1u << lane) - 1))] = key;
        }
        __syncthreads();
        u32 size = length;
        sort(sorted, size, start, end, scratch.bins, totals);
        seen += size;
        start = end;

        // The boxes of a tile are read while the tile before is compared. Of several, the first is small: the best boxes
        // overlap most, and what they suppress is not compared with the others.
        u64 key = 0;
        Raw raw = {};
        u32 width = total == 0 && size > 2 * TILE ? 32 : TILE;
        if (thread < width && thread < size) {
            key = sorted[thread];
            raw = read_box(outputs, image, (u32)key / CLASSES);
        }
        u32 known = 0;  // kept boxes that have been compared with all that are left of the chunk
        for (u32 at = 0; at < size && total < limit; at += width, width = TILE) {
            // Where kept boxes suppress most of a tile, they do most of the others, which need no tile then.
            if (is_crowded && size > at + TILE) {
                size = at + drop_suppressed(outputs, image, sorted + at, size - at, kept, total, threshold, totals);
                known = total;
                if (thread < TILE && at + thread < size) {
                    key = sorted[at + thread];
                    raw = read_box(outputs, image, (u32)key / CLASSES);
                }
            }
            if (thread < TILE) {
                float4 box = corners(outputs, raw, (u32)key / CLASSES);
                bool finite = thread < width && at + thread < size && fabsf(box.x) <= 3.402823466e38f && fabsf(box.y) <= 3.402823466e38f
                    && fabsf(box.z) <= 3.402823466e38f && fabsf(box.w) <= 3.402823466e38f;
                tile.box[thread] = box;
                tile.area[thread] = (box.z - box.x) * (box.w - box.y);
                tile.label[thread] = (u32)key % CLASSES;
                tile.cell[thread] = cell_of(box);
                tile.score[thread] = __uint_as_float(ALL - (u32)(key >> 32));
#pragma unroll
                for (int word = 0; word < WORDS; ++word) tile.better[thread][word] = 0;
                u32 votes = __ballot_sync(ALL, finite);
                if (lane == 0) {
                    valid[warp] = votes;
                    suppressed[warp] = 0;
                }
            }
            __syncthreads();
            if (thread < TILE && at + width + thread < size) {
                key = sorted[at + width + thread];
                raw = read_box(outputs, image, (u32)key / CLASSES);
            }
            // A warp compares 32 of the tile with its share of the kept boxes.
            {
                const u32 group = warp % WORDS, mine = 32 * group + lane;
                const float4 box = tile.box[mine];
                const float area = tile.area[mine];
                const bool out = is_suppressed(kept, total, known / 32 + warp / WORDS, SUBSETS, box, area,
                    tile.label[mine], tile.cell[mine], threshold);
                u32 votes = __ballot_sync(ALL, out);
                if (lane == 0 && votes) atomicOr(&suppressed[group], votes);
            }
            __syncthreads();
            // Those left, in order: with few of them, all warps share few comparisons.
            u32 number = 0, valid_ones = 0;
#pragma unroll
            for (int word = 0; word < WORDS; ++word) {
                const u32 left = valid[word] & ~suppressed[word];
                valid_ones += __popc(valid[word]);
                if (warp == word && (left >> lane & 1)) alive[number + __popc(left & ((1u << lane) - 1))] = thread;
                number += __popc(left);
            }
            __syncthreads();
            is_crowded = 2 * number <= valid_ones;
            for (u32 begin = 0; begin < number; begin += 32) {
                const u32 mine = begin + lane, last = begin + 32 < number ? begin + 32 : number;
                if (mine < number) {
                    const u32 one = alive[mine], label = tile.label[one];
                    const float4 box = tile.box[one];
                    const float area = tile.area[one];
                    for (u32 better = warp; better < last; better += WARPS) {
                        const u32 other = alive[better];
                        if (better < mine && label == tile.label[other]
                            && overlap(box, area, tile.box[other], tile.area[other], threshold))
                            atomicOr(&tile.better[mine][better / 32], 1u << better % 32);
                    }
                }
            }
            __syncthreads();
            if (warp == 0) {
                // One is kept as soon as all better ones that overlap it are known to be suppressed.
                u32 keeps[WORDS], taken = 0;
#pragma unroll
                for (int word = 0; word < WORDS; ++word) {
                    keeps[word] = 0;
                    if (32 * word >= number) break;
                    const u32 mine = 32 * word + lane;
                    const u32* better = tile.better[mine];
                    bool is_open = mine < number;
#pragma unroll
                    for (int before = 0; before < word; ++before) is_open = is_open && !(better[before] & keeps[before]);
                    const u32 own = better[word];
                    for (u32 open; (open = __ballot_sync(ALL, is_open));) {
                        const bool is_best = is_open && !(own & open);
                        const u32 best = __ballot_sync(ALL, is_best);
                        keeps[word] |= best;
                        is_open = is_open && !is_best && !(own & best);
                    }
                    const u32 place = taken + __popc(keeps[word] & ((1u << lane) - 1));
                    if ((keeps[word] >> lane & 1) && total + place < limit) chosen[place] = alive[mine];
                    taken += __popc(keeps[word]);
                }
                if (lane == 0) added = taken < limit - total ? taken : limit - total;
            }
            __syncthreads();
            const u32 taken = added;
            if (thread < taken) {
                u32 from = chosen[thread], to = total + thread;
                float4 best = tile.box[from];
                kept.box[to] = best;
                kept.area[to] = tile.area[from];
                kept.score[to] = tile.score[from];
                kept.label[to] = tile.label[from];
            }
            for (u32 index = warp; index < taken; index += WARPS)
                mark(kept, total + index, tile.box[chosen[index]], threshold, lane);
            total += taken;
            __syncthreads();
        }
    }

    unsigned char* result = results + (u64)image * ((sizeof(Header) + 28 * limit + 15) / 16 * 16);
    float4* boxes = (float4*)(result + sizeof(Header));
    long long* labels = (long long*)(boxes + limit);
    float* scores = (float*)(labels + limit);
    u32 written = 0;
    for (u32 base = 0; base < total; base += THREADS) {
        const u32 index = base + thread;
        bool is_there = index < total;
        float4 box = {};
        if (is_there) box = kept.box[index];
        if (is_there && pictures) {
            box.x = to_source(box.x, picture.left, picture.resized_width, picture.width, clip);
            box.y = to_source(box.y, picture.top, picture.resized_height, picture.height, clip);
            box.z = to_source(box.z, picture.left, picture.resized_width, picture.width, clip);
            box.w = to_source(box.w, picture.top, picture.resized_height, picture.height, clip);
            is_there = !clip || (box.z > box.x && box.w > box.y);
        }
        const u32 votes = __ballot_sync(ALL, is_there);
        u32 all;
        const u32 place = written + sum_before(__popc(votes), totals, &all) + __popc(votes & ((1u << lane) - 1));
        if (is_there) {
            boxes[place] = box;
            labels[place] = kept.label[index];
            scores[place] = kept.score[index];
        }
        written += all;
        __syncthreads();
    }
    __syncthreads();  // all have read the count
    if (thread == 0) {
        counts[image] = 0;
        Header header = {written, found, {0, 0}};
        *(Header*)result = header;
    }
}
