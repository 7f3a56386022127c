// Check unidrop.cuh with the golden vectors: on the host, and on a GPU if there is one.
//
//     unidrop vectors --out vectors
//     nvcc -o check examples/cuda/check.cu && ./check vectors/vectors.json
//     g++ -x c++ -o check examples/cuda/check.cu && ./check vectors/vectors.json
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include "unidrop.cuh"

// --- A kernel to start from: y = dropout(x), eight elements a thread ------------------------------

#ifdef __CUDACC__
__global__ void dropout(const float* x, float* y, uint64_t size, uint64_t key, uint64_t threshold, float scale) {
    uint64_t number = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x;
    unidrop::Words block = unidrop::mask_block(key, number);
#pragma unroll
    for (unsigned j = 0; j < 8; j++) {
        uint64_t i = 8 * number + j;
        if (i < size) y[i] = unidrop::apply(x[i], unidrop::keep(unidrop::u(block, j), threshold), scale);
    }
}

// Return how many elements of an output on the GPU differ from the host, or -1 without a GPU.
static int compare_gpu(uint64_t key, unidrop::Rate rate, int size) {
    int devices = 0, differ = 0;
    float *x, *y;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || !devices) return -1;
    if (cudaMallocManaged(&x, 4 * size) != cudaSuccess || cudaMallocManaged(&y, 4 * size) != cudaSuccess) return size;
    for (int i = 0; i < size; i++) x[i] = (float)(i + 1);
    dropout<<<(unsigned)((size + 1023) / 1024), 128>>>(x, y, size, key, rate.threshold, (float)rate.scale);
    if (cudaDeviceSynchronize() != cudaSuccess) return size;
    for (int i = 0; i < size; i++)
        differ += y[i] != unidrop::apply(x[i], unidrop::keep(unidrop::u(key, i), rate.threshold), (float)rate.scale);
    cudaFree(x), cudaFree(y);
    return differ;
}
#endif

// --- The vectors: JSON with one vector per line ---------------------------------------------------

static const char* field(const std::string& line, const char* name) {
    size_t at = line.find('"' + std::string(name) + "\": ");
    return at == std::string::npos ? nullptr : line.c_str() + at + strlen(name) + 4;
}

static uint64_t hex(const char* quoted) { return strtoull(quoted + 1, nullptr, 16); }

// Read an array of numbers in a base, quoted or not. A null is an empty array.
static std::vector<uint64_t> numbers(const std::string& line, const char* name, int base) {
    std::vector<uint64_t> found;
    const char *at = field(line, name), *end = strpbrk(at, "]n");
    for (at += strspn(at, "[\""); at < end; at += strspn(at, "\", ")) found.push_back(strtoull(at, (char**)&at, base));
    return found;
}

static bool check_generator(const std::string& line) {
    auto c = numbers(line, "counter", 16), key = numbers(line, "key", 16), words = numbers(line, "words", 16);
    auto w = unidrop::philox({(uint32_t)c[0], (uint32_t)c[1], (uint32_t)c[2], (uint32_t)c[3]}, key[1] << 32 | key[0]);
    return w.w0 == words[0] && w.w1 == words[1] && w.w2 == words[2] && w.w3 == words[3];
}

static bool check_key(const std::string& line) {
    uint64_t key = hex(field(line, "seed"));
    for (const char* at = line.c_str(); (at = strstr(at, "\"int\": ")); at += 7) key = unidrop::fold_in(key, hex(at + 7));
    return key == hex(field(line.substr(line.rfind(']')), "key"));
}

static bool check_mask(const std::string& line) {
    uint64_t key = hex(field(line, "key"));
    unidrop::Rate rate(strtod(field(line, "p"), nullptr));
    const char* kept = field(line, "keep") + 1;
    auto shown = numbers(line, "u", 16);
    bool holds = true;
    for (uint64_t i = 0; kept[i] != '"'; i++) {
        uint32_t u = unidrop::u(key, i);
        holds &= unidrop::keep(u, rate.threshold) == (kept[i] == '1') && (i >= shown.size() || u == shown[i]);
    }
    return holds;
}

template <class Float, class Bits>
static bool check_output(const std::string& line) {
    auto x = numbers(line, "x", 16), y = numbers(line, "y", 16);
    uint64_t key = hex(field(line, "key"));
    unidrop::Rate rate(strtod(field(line, "p"), nullptr));
    bool holds = true;
    for (size_t i = 0; i < x.size(); i++) {
        Bits in = (Bits)x[i], out = (Bits)y[i];
        Float value, expected;
        memcpy(&value, &in, sizeof value), memcpy(&expected, &out, sizeof expected);
        value = unidrop::apply(value, unidrop::keep(unidrop::u(key, i), rate.threshold), (Float)rate.scale);
        holds &= memcmp(&value, &expected, sizeof value) == 0 || (value != value && expected != expected);
    }
    return holds;
}

// Return 1 if a vector holds, 0 if not, and -1 for what this program cannot check.
static int check(const std::string& section, const std::string& line) {
    if (section == "generator") return check_generator(line);
    if (section == "keys") return strstr(line.c_str(), "{\"str\"") ? -1 : check_key(line);  // BLAKE2b
    if (section == "masks") return *field(line, "global_shape") == '[' ? -1 : check_mask(line);
    const char* dtype = section == "outputs" ? field(line, "dtype") : "";
    if (!strncmp(dtype, "\"float32\"", 9)) return check_output<float, uint32_t>(line);
    if (!strncmp(dtype, "\"float64\"", 9)) return check_output<double, uint64_t>(line);
    return -1;
}

int main(int argc, char** argv) {
    std::ifstream file(argc == 2 ? argv[1] : "");
    if (!file) return fprintf(stderr, "usage: check vectors.json\n"), 2;
    std::string line, section;
    int checked = 0, failed = 0, skipped = 0;
    while (std::getline(file, line)) {
        if (line.rfind("\"stream\": ", 0) == 0 && atoi(line.c_str() + 10) != 1)
            return fprintf(stderr, "stream must be 1, got %s\n", line.c_str() + 10), 2;
        if (line[0] == '"') section = line.substr(1, line.find('"', 1) - 1);
        if (line[0] != '{' || line.size() < 2) continue;
        int holds = check(section, line);
        holds < 0 ? skipped++ : checked++;
        if (!holds && failed++ < 5) fprintf(stderr, "vector failed: %.120s\n", line.c_str());
    }
    printf("%d vectors checked, %d failed, %d skipped\n", checked, failed, skipped);
#ifdef __CUDACC__
    int differ = compare_gpu(unidrop::fold_in(42, 7), unidrop::Rate(0.1), 1000003);
    if (differ < 0)
        printf("the GPU was not checked: there is none\n");
    else
        printf("%d elements differ on the GPU\n", differ), failed += differ;
#endif
    return failed || !checked;
}
