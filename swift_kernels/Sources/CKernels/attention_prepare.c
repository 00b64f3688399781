#include <math.h>
#include <stdio.h>
#include "attention_layout.h"
#include "kv_codec.h"
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
  const struct {
    const char *name, *dim_name;
    uint32_t codec, dim, scales;
  } planes[2] = {{"k", "head_dim", p->k_codec, p->head_dim, p->k_scales},
                 {"v", "value_dim", p->v_codec, p->value_dim, p->v_scales}};
  for (int i = 0; i < 2; ++i) {
    if (!ms_kv_known(planes[i].codec)) {
      snprintf(message, 256, "attention: %s_codec is %u, not an ms_kv_codec", planes[i].name, planes[i].codec);
      return message;
    }
    if (!ms_kv_dim_ok(planes[i].codec, planes[i].dim)) {
      snprintf(message, 256, "attention: %s is %u, which %s_codec %u does not take", planes[i].dim_name, planes[i].dim,
               planes[i].name, planes[i].codec);
      return message;
    }
    if ((planes[i].scales == 0) != ms_kv_is_float(planes[i].codec)) {
      snprintf(message, 256, "attention: %s_scales is %u words for %s_codec %u; expected 0 for floats alone",
               planes[i].name, planes[i].scales, planes[i].name, planes[i].codec);
      return message;
    }
  }
  if (!isfinite(p->scale) || !isfinite(p->softcap)) return "attention: scale or softcap is not finite";
  scratch->per_thread = ms_attention_scratch(p, max_tokens, (uint32_t)threads) * sizeof(float);
  scratch->shared = (uint64_t)(threads - 1) * MS_ATTN_SPLITS * ms_attention_narrow_part(p) * sizeof(float);
  return NULL;
}
