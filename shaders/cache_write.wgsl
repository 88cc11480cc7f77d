// k_cache[pos + t], v_cache[pos + t] = rotated keys and values of the pass's tokens, as f16.
// Lane = four pairs of one kv head of one token. Dispatch: (ceil(n_kv_heads * half_padded / 4 / 64), tokens).

//#import state
//#import pairs
//#import pages
//#import heads

struct Params {
  n_heads: u32,
  n_kv_heads: u32,
  head_dim: u32,
  half_padded: u32,  // head_dim / 2 rounded up to a multiple of 4; the padding stays zero
  max_pos: u32,
  blocks_per_table: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> state: State;
@group(0) @binding(2) var<storage, read> y: array<f32>;  // (tokens, rows of q | k | v)
@group(0) @binding(3) var<storage, read> rope: array<vec2<f32>>;
@group(0) @binding(4) var<storage, read_write> k_cache: array<vec4<u32>>;
@group(0) @binding(5) var<storage, read_write> v_cache: array<vec4<u32>>;
@group(0) @binding(6) var<storage, read> blocks: array<u32>;  // (blocks_per_table,)

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
  let quads = params.half_padded / 4u;
  let token = id.y;
  if (id.x >= params.n_kv_heads * quads || token >= state.n_tokens) { return; }
  let kv_head = id.x / quads;
  let quad = id.x % quads;
  let pos = state.pos + token;
  let k = rotated(projected(token, params.n_heads + kv_head, quad), pos, quad);
  let v = projected(token, params.n_heads + params.n_kv_heads + kv_head, quad);
  k_cache[k_index(kv_head, pos, quad)] = pack_f16(k);
  v_cache[v_index(kv_head, pos, quad)] = pack_f16(v);
}
