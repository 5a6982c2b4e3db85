// Scans and sums over packed segments; pack and unpack.

#include "block_carry.cuh"
#include "segment_sums.cuh"
#include "segmented_scan.cuh"

namespace pk {
namespace {

template <typename T>
struct Scan {
  const T* values;
  T* out;
  Packed packed;
  double gamma;
  const float* factor;
  Affine<1>* published;
};

template <typename T>
__global__ void __launch_bounds__(kThreads) scan_kernel(Scan<T> scan) {
  const Packed& packed = scan.packed;
  const BlockRange range(packed.tokens, blockIdx.x, gridDim.x);
  const Affine<1> carry = carry_over_blocks(scan.values, packed, range, scan.gamma, scan.published);
  const double factor = scan.factor == nullptr ? 1.0 : static_cast<double>(*scan.factor);
  const auto input = [&](int64_t token, const Segment&) {
    return Affine<1>{scan.gamma, {static_cast<double>(scan.values[token])}};
  };
  const auto store = [&](int64_t token, const Segment&, const double* y) {
    scan.out[token] = static_cast<T>(y[0] * factor);
  };
  scan_block<1>(packed, range, carry, input, store);
}

template <typename T>
int launch_scan(const pk_segment_scan_args& args, void* stream) {
  const Packed packed{args.cu_seqlens, args.n_segments, args.n_tokens, args.reverse != 0};
  static_assert(sizeof(Affine<1>) == sizeof(pk_affine));
  auto* published = reinterpret_cast<Affine<1>*>(args.published);
  const Scan<T> scan{static_cast<const T*>(args.values), static_cast<T*>(args.out), packed,
                     args.gamma, args.factor, published};
  return launch("scan_kernel", scan_kernel<T>, blocks_for(args.n_tokens), true, stream, scan);
}

__global__ void __launch_bounds__(kThreads) sum_kernel(const float* values, Packed packed, double* out,
                                                       pk_affine* published, uint32_t* arrived) {
  sum_segments(values, packed, out, published);
  if (arrives_last(arrived)) join_segments(packed, out, published);
}

__global__ void __launch_bounds__(kThreads) fill_kernel(const double* values, const float* factor, Packed packed,
                                                        float* out) {
  const double scale = factor == nullptr ? 1.0 : static_cast<double>(*factor);
  const BlockRange range(packed.tokens, blockIdx.x, gridDim.x);
  Segment segment;
  for (int64_t t = range.begin + threadIdx.x; t < range.end; t += kThreads) {
    segment.seek(packed.cu, packed.segments, t);
    out[t] = static_cast<float>(values[segment.index] * scale);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) pack_kernel(pk_pack_args args) {
  const T* in = static_cast<const T*>(args.in);
  T* out = static_cast<T*>(args.out);
  const Packed packed{args.cu_seqlens, args.n_rows, args.n_tokens, false};
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  Segment row;
  const int64_t elements = args.n_tokens * args.width;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < elements; i += step) {
    const int64_t token = i / args.width;
    row.seek(packed.cu, packed.segments, token);
    const int64_t skipped = args.pad_left != 0 ? args.length - (row.end - row.begin) : 0;
    out[i] = in[(row.index * args.length + skipped + token - row.begin) * args.width + i % args.width];
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) unpack_kernel(pk_pack_args args) {
  const T* in = static_cast<const T*>(args.in);
  T* out = static_cast<T*>(args.out);
  const T fill = static_cast<T>(args.fill);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t elements = args.n_rows * args.length * args.width;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < elements; i += step) {
    const int64_t row = i / (args.length * args.width);
    const int64_t begin = args.cu_seqlens[row];
    const int64_t tokens = args.cu_seqlens[row + 1] - begin;
    const int64_t column = i / args.width % args.length - (args.pad_left != 0 ? args.length - tokens : 0);
    out[i] = column >= 0 && column < tokens ? in[(begin + column) * args.width + i % args.width] : fill;
  }
}

template <typename T>
int launch_pack(const pk_pack_args& args, bool unpack, void* stream) {
  const int64_t elements = (unpack ? args.n_rows * args.length : args.n_tokens) * args.width;
  if (elements == 0) return PK_OK;
  const unsigned blocks = blocks_over(elements, 32);
  if (unpack) return launch("unpack_kernel", unpack_kernel<T>, blocks, false, stream, args);
  return launch("pack_kernel", pack_kernel<T>, blocks, false, stream, args);
}

int pack_or_unpack(const pk_pack_args* args, bool unpack, void* stream) {
  if (args == nullptr || args->n_rows < 0 || args->length < 0 || args->width < 1) return PK_BAD_ARGUMENT;
  switch (args->itemsize) {
    case 1: return launch_pack<uint8_t>(*args, unpack, stream);
    case 2: return launch_pack<uint16_t>(*args, unpack, stream);
    case 4: return launch_pack<uint32_t>(*args, unpack, stream);
    case 8: return launch_pack<uint64_t>(*args, unpack, stream);
    default: return PK_BAD_ARGUMENT;
  }
}

}  // namespace
}  // namespace pk

extern "C" int pk_cuda_segment_scan(const pk_segment_scan_args* args, void* stream) {
  using namespace pk;
  if (args == nullptr || args->n_segments < 0 || args->n_tokens < 0) return PK_BAD_ARGUMENT;
  if (args->n_tokens == 0) return PK_OK;
  if (args->n_segments == 0 || args->published == nullptr) return PK_BAD_ARGUMENT;
  if (args->dtype == PK_FLOAT64) return launch_scan<double>(*args, stream);
  return args->dtype == PK_FLOAT32 ? launch_scan<float>(*args, stream) : PK_BAD_ARGUMENT;
}

extern "C" int pk_cuda_segment_sum(const pk_segment_sum_args* args, void* stream) {
  using namespace pk;
  if (args == nullptr || args->n_segments < 0 || args->n_tokens < 0) return PK_BAD_ARGUMENT;
  if (args->n_segments == 0) return args->n_tokens > 0 ? PK_BAD_ARGUMENT : PK_OK;
  const Packed packed{args->cu_seqlens, args->n_segments, args->n_tokens, true};
  return launch("sum_kernel", sum_kernel, blocks_for(args->n_tokens), false, stream, args->values, packed, args->out,
                args->published, args->arrived);
}

extern "C" int pk_cuda_segment_fill(const pk_segment_fill_args* args, void* stream) {
  using namespace pk;
  if (args == nullptr || args->n_segments < 0 || args->n_tokens < 0) return PK_BAD_ARGUMENT;
  if (args->n_tokens == 0) return PK_OK;
  if (args->n_segments == 0) return PK_BAD_ARGUMENT;
  const Packed packed{args->cu_seqlens, args->n_segments, args->n_tokens, false};
  return launch("fill_kernel", fill_kernel, blocks_for(args->n_tokens), false, stream, args->values, args->factor,
                packed, args->out);
}

extern "C" int pk_cuda_pack(const pk_pack_args* args, void* stream) { return pk::pack_or_unpack(args, false, stream); }

extern "C" int pk_cuda_unpack(const pk_pack_args* args, void* stream) { return pk::pack_or_unpack(args, true, stream); }
