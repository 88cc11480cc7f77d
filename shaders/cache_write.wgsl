// k_cache[pos + t], v_cache[pos + t] = rotated keys and values of the pass's tokens, as shared/cache.wgsl has them.
// One workgroup = one kv head of one token, a lane four pairs of it. Dispatch: (n_kv_heads, tokens).

//#import state
//#import pairs
//#import pages
//#import heads
//#import cache
//#import cache_store

const LANES = 32u;  // heads of up to 256

struct Params {
  n_heads: u32,
  n_kv_heads: u32,
  head_dim: u32,
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

var<workgroup> sizes: array<vec3<f32>, LANES>;

@compute @workgroup_size(LANES)
fn main(@builtin(local_invocation_index) quad: u32, @builtin(workgroup_id) group: vec3<u32>) {
  let kv_head = group.x;
  let token = group.y;
  if (token >= state.n_tokens) { return; }
  let pos = state.pos + token;
  var k: Pair;
  var v: Pair;
  if (quad < half_quads) {
    k = rotated(projected(token, params.n_heads + kv_head, quad), pos, quad);
    v = projected(token, params.n_heads + params.n_kv_heads + kv_head, quad);
  }
  var most = vec3<f32>(0.0);
  if (min(key_bits, value_bits) < 16u) {
    sizes[quad] = largest_of(k, v);
    workgroupBarrier();
    for (var i = 0u; i < half_quads; i++) { most = max(most, sizes[i]); }
  }
  if (quad < half_quads) {
    let row = cache_row(kv_head, pos);
    store_key(row, quad, k, most.x);
    store_value(row, quad, v, most.yz);
  }
}
