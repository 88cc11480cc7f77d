// What attention in splits reads and leaves, however its lanes share the work. Beside it stands pairs.wgsl; the importer provides
// y: array<f32>  (splits, tokens, rows of q | k | v),  partial: array<atomic<u32>>  and  params.n_heads, params.n_kv_heads, params.tokens.

override splits: u32;  // of y

const NEVER = -1e30;  // below every score; not infinite, so that differences of two stay numbers

fn projected(token: u32, head: u32, quad: u32) -> Pair {  // heads are counted through q | k | v
  let rows = (params.n_heads + 2u * params.n_kv_heads) * params.head_dim;
  var sum = Pair(vec4<f32>(0.0), vec4<f32>(0.0));
  for (var split = 0u; split < splits; split++) {
    let begin = (split * params.tokens + token) * rows + head * params.head_dim;
    sum.lo += quad_at(begin, quad);
    sum.hi += quad_at(begin + params.head_dim / 2u, quad);
  }
  return sum;
}

fn store_partial(i: u32, value: f32) { atomicStore(&partial[i], bitcast<u32>(value)); }
fn load_partial(i: u32) -> f32 { return bitcast<f32>(atomicLoad(&partial[i])); }
