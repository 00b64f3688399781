#include <math.h>
#include <stdio.h>
#include "attention_layout.h"
#include "prepare.h"

MS_PREPARE(attention) {
  const MSAttentionParams *p = constants;
  (void)max_sampled;
  if (const_bytes != sizeof *p || (uintptr_t)constants % 4 != 0)
    return "attention: constants are not one MSAttentionParams";
  if (binds <= MS_ATTN_SEQUENCES) return "attention: fewer bindings than ms_attention_slot names";
  if (p->num_kv_heads == 0 || p->num_q_heads == 0 || p->num_q_heads % p->num_kv_heads != 0) {
    snprintf(message, 256, "attention: %u query heads are not a multiple of %u kv heads", p->num_q_heads,
             p->num_kv_heads);
    return message;
  }
  if (p->num_q_heads > 1 << 16) return "attention: more than 65536 query heads";
  if (p->head_dim == 0 || p->head_dim > 1 << 16 || p->value_dim == 0 || p->value_dim > 1 << 16 ||
      p->value_dim % 16 != 0) {
    snprintf(message, 256, "attention: head_dim %u and value_dim %u; expected up to 65536, value_dim a multiple of 16",
             p->head_dim, p->value_dim);
    return message;
  }
  if (p->block_size < 16 || p->block_size > 1 << 16 || (p->block_size & (p->block_size - 1)) != 0) {
    snprintf(message, 256, "attention: block_size is %u; expected a power of two from 16", p->block_size);
    return message;
  }
  if (p->kv_dtype > MS_BFLOAT16) return "attention: kv_dtype is not float32, float16 or bfloat16";
  if (!isfinite(p->scale) || !isfinite(p->softcap)) return "attention: scale or softcap is not finite";
  scratch->per_thread = ms_attention_scratch(p, max_tokens, (uint32_t)threads) * sizeof(float);
  scratch->shared = (uint64_t)(threads - 1) * MS_ATTN_SPLITS * ms_attention_narrow_part(p) * sizeof(float);
  return NULL;
}
