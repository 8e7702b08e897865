// Letterbox: images of any size on the GPU in, rows of a network's input out, resized as OpenCV does.
//
// cv2.resize computes 8-bit images in fixed point (INTER_LINEAR, INTER_CUBIC) or float (INTER_AREA);
// the steps here are the same, in the same order, so that the pixels are the same. Compiled without
// contraction of a * b + c (--fmad=false), which would round once instead of twice.

enum Method { COPY, LINEAR, AREA, AREA_OF_WHOLE_PIXELS, ENLARGED_BY_AREA, CUBIC };

struct Picture {
    const unsigned char* pixels;       // red of the upright image's first pixel; null: a row of zeros
    long long row_step, column_step;   // bytes to the pixel below and to the one on the right
    int height, width;                 // of the upright image
    int top, left, resized_height, resized_width;  // where it goes in the input
    int method;
    int channel_step;                  // bytes from red to green and from green to blue
};

// What one output row or column is made of: `count` source pixels from `first` on.
struct Taps {
    int first, count;
    int fixed[4];                // weights in 1/2048: two for LINEAR, four for CUBIC
    float begin, middle, end;    // weights for AREA
};

#define FIXED_BITS 11
#define GRAY 114

__device__ __forceinline__ int between(int value, int least, int most) {
    return value < least ? least : value > most ? most : value;
}

__device__ __forceinline__ int to_fixed(float weight) {
    return (int)rintf(weight * (float)(1 << FIXED_BITS));
}

__device__ void area_taps(int place, int source, int target, Taps* taps) {
    double scale = 1.0 / ((double)target / source);
    double from = place * scale, to = from + scale;
    double cell = fmin(scale, source - from);
    int last = (int)floor(to);
    if (last > source - 1) last = source - 1;
    int first = (int)ceil(from);
    if (first > last) first = last;
    bool has_begin = first - from > 1e-3, has_end = to - last > 1e-3;
    taps->first = first - has_begin;
    taps->count = last - first + has_begin + has_end;
    taps->middle = (float)(1.0 / cell);
    taps->begin = has_begin ? (float)((first - from) / cell) : taps->middle;
    taps->end = has_end ? (float)(fmin(fmin(to - last, 1.0), cell) / cell) : taps->middle;
    if (taps->count == 1) taps->begin = has_end ? taps->end : taps->begin;
}

__device__ void fixed_taps(int place, int source, int target, int method, bool is_column, Taps* taps) {
    double inverse = (double)target / source, scale = 1.0 / inverse;
    float fraction;
    int first;
    if (method == ENLARGED_BY_AREA) {
        first = (int)floor(place * scale);
        fraction = (float)((place + 1) - (first + 1) * inverse);
        fraction = fraction <= 0 ? 0.f : fraction - floorf(fraction);
    } else {
        fraction = (float)((place + 0.5) * scale - 0.5);
        first = (int)floorf(fraction);
        fraction -= (float)first;
    }
    if (method == CUBIC) {
        const float a = -0.75f;
        float x = fraction, y = 1.f - x;
        float weight[4];
        weight[0] = ((a * (x + 1.f) - 5.f * a) * (x + 1.f) + 8.f * a) * (x + 1.f) - 4.f * a;
        weight[1] = ((a + 2.f) * x - (a + 3.f)) * x * x + 1.f;
        weight[2] = ((a + 2.f) * y - (a + 3.f)) * y * y + 1.f;
        weight[3] = 1.f - weight[0] - weight[1] - weight[2];
        taps->first = first - 1;
        taps->count = 4;
        for (int k = 0; k < 4; ++k) taps->fixed[k] = to_fixed(weight[k]);
        return;
    }
    // OpenCV clamps columns with their weights, rows without.
    if (is_column && first < 0) first = 0, fraction = 0;
    if (is_column && first >= source - 1) first = source - 1, fraction = 0;
    taps->first = first;
    taps->count = 2;
    taps->fixed[0] = to_fixed(1.f - fraction);
    taps->fixed[1] = to_fixed(fraction);
}

__device__ __noinline__ void make_taps(int place, int source, int target, int method, bool is_column, Taps* taps) {
    if (method == AREA) area_taps(place, source, target, taps);
    else if (method == AREA_OF_WHOLE_PIXELS) {
        taps->count = (int)rint(1.0 / ((double)target / source));
        taps->first = place * taps->count;
    } else fixed_taps(place, source, target, method, is_column, taps);
}

__device__ __forceinline__ float area_weight(const Taps* taps, int k) {
    return k == 0 ? taps->begin : k == taps->count - 1 ? taps->end : taps->middle;
}

// Return one channel of an output pixel. A call, since written out twelve times it would fill
// the instruction cache.
__device__ __noinline__ int resized(
    const Picture* picture, const unsigned char* plane, const Taps* x, const Taps* y)
{
    const long long row = picture->row_step, column = picture->column_step;
    const int bottom = picture->height - 1, right = picture->width - 1;
    switch (picture->method) {
    case LINEAR:
    case ENLARGED_BY_AREA: {
        int value = 2;
        for (int k = 0; k < 2; ++k) {
            const unsigned char* line = plane + between(y->first + k, 0, bottom) * row;
            int sum = line[x->first * column] * x->fixed[0]
                + line[between(x->first + 1, 0, right) * column] * x->fixed[1];
            value += (y->fixed[k] * (sum >> 4)) >> 16;
        }
        return between(value >> 2, 0, 255);
    }
    case CUBIC: {
        long long value = 1 << (2 * FIXED_BITS - 1);
        for (int k = 0; k < 4; ++k) {
            const unsigned char* line = plane + between(y->first + k, 0, bottom) * row;
            int sum = 0;
            for (int j = 0; j < 4; ++j)
                sum += line[between(x->first + j, 0, right) * column] * x->fixed[j];
            value += (long long)sum * y->fixed[k];
        }
        return between((int)(value >> (2 * FIXED_BITS)), 0, 255);
    }
    case AREA_OF_WHOLE_PIXELS: {
        int sum = 0;
        for (int k = 0; k < y->count; ++k)
            for (int j = 0; j < x->count; ++j)
                sum += plane[(y->first + k) * row + (x->first + j) * column];
        if (x->count == 2 && y->count == 2) return (sum + 2) >> 2;
        return between((int)rintf((float)sum * (float)(1.0 / (x->count * y->count))), 0, 255);
    }
    default: {
        float value = 0.f;
        for (int k = 0; k < y->count; ++k) {
            const unsigned char* line = plane + (y->first + k) * row;
            float sum = 0.f;
            for (int j = 0; j < x->count; ++j)
                sum = sum + (float)line[(x->first + j) * column] * area_weight(x, j);
            value = value + sum * area_weight(y, k);
        }
        return between((int)rintf(value), 0, 255);
    }
    }
}

#ifdef BYTE_INPUT
typedef unsigned char Element;  // (batch, height, width, 3)
#else
typedef float Element;          // (batch, 3, height, width)
#endif

// Neighbours in a row that a thread makes: four, written at once, where rows are made of such.
#ifndef PIXELS
#define PIXELS 4
#endif

#define TILE_WIDTH 32
#define TILE_HEIGHT 8
#define COLUMNS (TILE_WIDTH * PIXELS)

// Four neighbours of an image whose channels lie side by side, by words, as far as they are needed.
__device__ __forceinline__ void copy_four(const unsigned char* first, bool is_rgb, int values[][3])
{
    const int shift = (int)((size_t)first & 3);
    const unsigned* words = (const unsigned*)(first - shift);
    const unsigned last = shift ? words[3] : 0;
    const unsigned packed[3] = {
        __funnelshift_r(words[0], words[1], 8 * shift),
        __funnelshift_r(words[1], words[2], 8 * shift),
        __funnelshift_r(words[2], last, 8 * shift)};
#pragma unroll
    for (int place = 0; place < 12; ++place) {
        const int value = (packed[place / 4] >> (8 * (place % 4))) & 255;
        if (is_rgb) values[place / 3][place % 3] = value;
        else values[place / 3][2 - place % 3] = value;
    }
}

extern "C" __global__ void letterbox(
    const Picture* __restrict__ pictures,  // one a row of the batch
    Element* __restrict__ input, int height, int width,
    int is_bgr, float red_mean, float green_mean, float blue_mean,
    float red_std, float green_std, float blue_std)
{
    __shared__ Taps columns[COLUMNS];
    __shared__ Taps rows[TILE_HEIGHT];
    __shared__ Picture picture;
    const int thread = threadIdx.y * TILE_WIDTH + threadIdx.x;
    if (thread == 0) picture = pictures[blockIdx.z];
    __syncthreads();
    const bool has_taps = picture.pixels && picture.method != COPY;
    for (int place = thread; has_taps && place < COLUMNS + TILE_HEIGHT;
         place += TILE_WIDTH * TILE_HEIGHT) {
        if (place < COLUMNS)
            make_taps((int)(blockIdx.x * COLUMNS) + place - picture.left, picture.width,
                picture.resized_width, picture.method, true, columns + place);
        else
            make_taps((int)(blockIdx.y * TILE_HEIGHT) + place - COLUMNS - picture.top,
                picture.height, picture.resized_height, picture.method, false,
                rows + (place - COLUMNS));
    }
    __syncthreads();

    const int x = (blockIdx.x * TILE_WIDTH + threadIdx.x) * PIXELS;
    const int y = blockIdx.y * TILE_HEIGHT + threadIdx.y;
    if (x >= width || y >= height) return;
    int values[PIXELS][3];
    const int at_y = y - picture.top, at_x = x - picture.left;
    const bool is_row = picture.pixels && at_y >= 0 && at_y < picture.resized_height;
    const int step = picture.channel_step;
    if (PIXELS == 4 && is_row && picture.method == COPY && picture.column_step == 3
        && (step == 1 || step == -1) && at_x >= 0 && at_x + PIXELS <= picture.resized_width) {
        copy_four(picture.pixels + at_y * picture.row_step + at_x * 3LL - (step < 0 ? 2 : 0),
            step > 0, values);
    } else {
#pragma unroll
        for (int pixel = 0; pixel < PIXELS; ++pixel) {
            const bool is_inside
                = is_row && at_x + pixel >= 0 && at_x + pixel < picture.resized_width;
#pragma unroll
            for (int channel = 0; channel < 3; ++channel) {
                int value = picture.pixels ? GRAY : 0;
                if (is_inside) {
                    const unsigned char* plane = picture.pixels + channel * step;
                    value = picture.method == COPY
                        ? plane[at_y * picture.row_step + (at_x + pixel) * picture.column_step]
                        : resized(&picture, plane, columns + threadIdx.x * PIXELS + pixel,
                            rows + threadIdx.y);
                }
                values[pixel][channel] = value;
            }
        }
    }
#ifdef BYTE_INPUT
    Element* place = input + (((long long)blockIdx.z * height + y) * width + x) * 3;
#if PIXELS == 4
    unsigned words[3] = {0, 0, 0};
#pragma unroll
    for (int byte = 0; byte < 12; ++byte) {
        const int* pixel = values[byte / 3];
        const int value = is_bgr ? pixel[2 - byte % 3] : pixel[byte % 3];
        words[byte / 4] |= (unsigned)value << (8 * (byte % 4));
    }
    for (int word = 0; word < 3; ++word) ((unsigned*)place)[word] = words[word];
#else
    for (int channel = 0; channel < 3; ++channel)
        place[channel] = values[0][is_bgr ? 2 - channel : channel];
#endif
#else
    const float means[3] = {red_mean, green_mean, blue_mean};
    const float stds[3] = {red_std, green_std, blue_std};
#pragma unroll
    for (int channel = 0; channel < 3; ++channel) {
        const int from = is_bgr ? 2 - channel : channel;
        Element* place = input + (((long long)blockIdx.z * 3 + channel) * height + y) * width + x;
        float made[PIXELS];
        for (int pixel = 0; pixel < PIXELS; ++pixel)
            made[pixel] = picture.pixels
                ? ((float)(is_bgr ? values[pixel][2 - channel] : values[pixel][channel])
                    - means[from]) / stds[from]
                : 0.f;
#if PIXELS == 4
        *(float4*)place = make_float4(made[0], made[1], made[2], made[3]);
#else
        place[0] = made[0];
#endif
    }
#endif
}
