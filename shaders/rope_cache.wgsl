// q and k of every token rotated to its position (RoFormer eq. 34; pairs (i, i + head_dim / 2), as Hugging Face stores
// them), k and v put into the cache. A u32 of an f16 cache holds elements i and i + head_dim / 2 of one head; in an f32
// cache each has its own, half_padded apart.
// One lane = one pair of one head (q heads, then k, then v). Dispatch: (ceil(pairs / 64), tokens).

//#import state

override cache_f32: bool;
override splits: u32;  // of y

struct Params {
  n_heads: u32,
  n_kv_heads: u32,
  head_dim: u32,
  half_padded: u32,  // head_dim / 2 rounded up to a multiple of 4; the padding stays zero
  max_pos: u32,
  tokens: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> state: State;
@group(0) @binding(2) var<storage, read> y: array<f32>;                 // (splits, tokens, rows of q | k | v)
@group(0) @binding(3) var<storage, read> rope: array<vec2<f32>>;        // (max_pos, head_dim / 2): cos, sin
@group(0) @binding(4) var<storage, read_write> q: array<f32>;           // (tokens, n_heads, 2, half_padded)
@group(0) @binding(5) var<storage, read_write> k_cache: array<u32>;     // (n_kv_heads, max_pos, 1 or 2, half_padded)
@group(0) @binding(6) var<storage, read_write> v_cache: array<u32>;

fn row_sum(token: u32, row: u32) -> f32 {
  let rows = (params.n_heads + 2u * params.n_kv_heads) * params.head_dim;
  var sum = 0.0;
  for (var split = 0u; split < splits; split++) { sum += y[(split * params.tokens + token) * rows + row]; }
  return sum;
}

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
  let half = params.head_dim / 2u;
  let head = id.x / half;
  let i = id.x % half;
  let token = id.y;
  if (head >= params.n_heads + 2u * params.n_kv_heads || token >= state.n_tokens) { return; }
  let pos = state.pos + token;
  let a = row_sum(token, head * params.head_dim + i);
  let b = row_sum(token, head * params.head_dim + half + i);
  if (head >= params.n_heads + params.n_kv_heads) {
    let kv_head = head - params.n_heads - params.n_kv_heads;
    let at = (kv_head * params.max_pos + pos) * params.half_padded;
    if (cache_f32) {
      v_cache[2u * at + i] = bitcast<u32>(a);
      v_cache[2u * at + params.half_padded + i] = bitcast<u32>(b);
    } else {
      v_cache[at + i] = pack2x16float(vec2<f32>(a, b));
    }
    return;
  }
  let turn = rope[pos * half + i];
  let rotated = vec2<f32>(a * turn.x - b * turn.y, b * turn.x + a * turn.y);
  if (head < params.n_heads) {
    let at = (token * params.n_heads + head) * 2u * params.half_padded + i;
    q[at] = rotated.x;
    q[at + params.half_padded] = rotated.y;
  } else {
    let kv_head = head - params.n_heads;
    let at = (kv_head * params.max_pos + pos) * params.half_padded;
    if (cache_f32) {
      k_cache[2u * at + i] = bitcast<u32>(rotated.x);
      k_cache[2u * at + params.half_padded + i] = bitcast<u32>(rotated.y);
    } else {
      k_cache[at + i] = pack2x16float(rotated);
    }
  }
}
