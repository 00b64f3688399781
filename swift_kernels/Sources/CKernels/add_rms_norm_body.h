// add_rms_norm: residual += x, out = the sum normalised. Source: arXiv 1910.07467, section 4.
void MS_NAME(ms_add_rms_norm)(const ms_host_args *args) {
  const AddRMSNormParams *p = args->constants;
  const uint32_t n = p->hidden_size, rows = args->grid[0];
  const uint64_t thread = (uint64_t)args->thread, threads = (uint64_t)args->threads;
  const float *weight = args->buffers[2];
  for (uint32_t row = (uint32_t)(rows * thread / threads); row < rows * (thread + 1) / threads; ++row) {
    const float *x = (const float *)args->buffers[0] + (size_t)row * n;
    float *residual = (float *)args->buffers[1] + (size_t)row * n;
    float *out = (float *)args->buffers[3] + (size_t)row * n;
    for (uint32_t i = 0; i < n; i += 16) {
      const uint32_t rest = n - i < 16 ? n - i : 16;
      vstore_n(residual + i, vload_n(x + i, rest) + vload_n(residual + i, rest), rest);
    }
    const float scale = 1.0f / sqrtf(MS_NAME(span_squares)(residual, 0.0f, n) / (float)n + p->eps);
    for (uint32_t i = 0; i < n; i += 16) {
      const uint32_t rest = n - i < 16 ? n - i : 16;
      vstore_n(out + i, vload_n(residual + i, rest) * scale * vload_n(weight + i, rest), rest);
    }
  }
}
