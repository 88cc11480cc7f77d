// Queries, keys and values of a pass of many tokens of one sequence. Beside it stand pairs.wgsl and pages.wgsl; the importer provides
// y: array<f32>  (tokens, rows of q | k | v),  params.n_heads, params.n_kv_heads, params.max_pos.

fn projected(token: u32, head: u32, quad: u32) -> Pair {  // heads are counted through q | k | v
  let rows = (params.n_heads + 2u * params.n_kv_heads) * params.head_dim;
  let begin = token * rows + head * params.head_dim;
  return Pair(quad_at(begin, quad), quad_at(begin + params.head_dim / 2u, quad));
}

// Of a head's position in the cache.
fn cache_row(kv_head: u32, pos: u32) -> u32 { return kv_head * params.max_pos + cache_position(0u, pos); }
