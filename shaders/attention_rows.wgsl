// attention_prompt for software adapters: a lane takes four of the ROWS pairs of (token, head), and goes through the
// positions eight at a time; keys and values are the same for all lanes, and nothing passes between lanes. Workgroup
// memory holds what a loop indexes. Same result, same dispatch: (n_kv_heads, ceil(tokens / tokens_per_group)).

//#import state
//#import pairs
//#import pages
//#import heads
//#import cache

override tokens_per_group: u32;  // ROWS / heads of a kv head
override row_quads: u32;         // ROWS * 2 half_quads
override window: u32;            // positions that a token sees; 0: all

struct Params {
  n_heads: u32,
  n_kv_heads: u32,
  head_dim: u32,
  max_pos: u32,
  blocks_per_table: u32,
  scale: f32,  // 1 / sqrt(head_dim)
}

const NEVER = -1e30;  // below every score; not infinite, so that differences of two stay numbers
const LANES = 8u;     // one AVX2 vector
const ROWS = 32u;     // the rows i, i + 8, i + 16, i + 24 are a lane's, a vector of four
const POSITIONS = 8u;

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> state: State;
@group(0) @binding(2) var<storage, read> y: array<f32>;  // (tokens, rows of q | k | v)
@group(0) @binding(3) var<storage, read> rope: array<vec2<f32>>;
@group(0) @binding(4) var<storage, read> k_cache: array<vec4<u32>>;
@group(0) @binding(5) var<storage, read> v_cache: array<vec4<u32>>;
@group(0) @binding(6) var<storage, read_write> partial: array<f32>;  // (tokens, n_heads, 8 half_quads + 2)
@group(0) @binding(7) var<storage, read> blocks: array<u32>;  // (blocks_per_table,)

var<workgroup> queries: array<vec4<f32>, row_quads>;  // (half_quads, lo or hi, ROWS)
var<workgroup> mixed: array<vec4<f32>, row_quads>;

struct Four {  // rows of a lane: by element, by row
  lo: mat4x4<f32>,
  hi: mat4x4<f32>,
}

fn score(q: Four, kv_head: u32, pos: u32, quad: u32) -> vec4<f32> {
  let row = cache_row(kv_head, pos);
  let k = key(row, quad);
  return (q.lo * k.lo + q.hi * k.hi) * key_scale(row);
}

fn add(m: ptr<function, Four>, weight: vec4<f32>, kv_head: u32, pos: u32, quad: u32) {
  let row = cache_row(kv_head, pos);
  let v = value(row, quad);
  let scale = value_scale(row);
  let lo = v.lo * scale.x;
  let hi = v.hi * scale.y;
  (*m).lo += mat4x4<f32>(lo.x * weight, lo.y * weight, lo.z * weight, lo.w * weight);
  (*m).hi += mat4x4<f32>(hi.x * weight, hi.y * weight, hi.z * weight, hi.w * weight);
}

fn visible(pos: u32, own: vec4<u32>, seen_from: vec4<u32>) -> vec4<bool> {
  let seen = vec4<u32>(pos) <= own;
  if (window == 0u) { return seen; }
  return seen & vec4<u32>(pos) >= seen_from;
}

fn scaled(m: mat4x4<f32>, by: vec4<f32>) -> mat4x4<f32> {
  return mat4x4<f32>(m[0] * by, m[1] * by, m[2] * by, m[3] * by);
}

@compute @workgroup_size(LANES)
fn main(@builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) group: vec3<u32>) {
  let kv_head = group.x;
  let heads = params.n_heads / params.n_kv_heads;
  let first_token = group.y * tokens_per_group;
  if (first_token >= state.n_tokens) { return; }
  let last_token = min(first_token + tokens_per_group, state.n_tokens) - 1u;
  let last = state.pos + last_token;
  for (var r = 0u; r < 4u; r++) {
    let row = lane + LANES * r;
    let token = min(first_token + row / heads, last_token);  // rows past the last repeat it and are not written
    for (var quad = 0u; quad < half_quads; quad++) {
      let q = rotated(projected(token, kv_head * heads + row % heads, quad), state.pos + token, quad);
      let at = 2u * quad * ROWS + row;
      queries[at] = q.lo * params.scale;
      queries[at + ROWS] = q.hi * params.scale;
      mixed[at] = vec4<f32>(0.0);
      mixed[at + ROWS] = vec4<f32>(0.0);
    }
  }

  let rows = lane + LANES * vec4<u32>(0u, 1u, 2u, 3u);
  let own = state.pos + min(first_token + rows / heads, vec4<u32>(last_token));  // the rows' last positions
  var seen_from = vec4<u32>(0u);
  var begin = 0u;
  if (window > 0u) {  // positions that no row sees are passed over
    seen_from = own + 1u - min(own + 1u, vec4<u32>(window));
    let length = state.pos + first_token + 1u;
    begin = length - min(length, window);
  }
  var running_max = vec4<f32>(NEVER);
  var sum = vec4<f32>(0.0);
  for (var first = begin; first <= last; first += POSITIONS) {
    // Positions past the last repeat it and get no weight.
    let near = min(first + vec4<u32>(0u, 1u, 2u, 3u), vec4<u32>(last));
    let far = min(first + vec4<u32>(4u, 5u, 6u, 7u), vec4<u32>(last));
    // Written out: arrays that a loop indexes would not become registers.
    var s0 = vec4<f32>(0.0);
    var s1 = vec4<f32>(0.0);
    var s2 = vec4<f32>(0.0);
    var s3 = vec4<f32>(0.0);
    var s4 = vec4<f32>(0.0);
    var s5 = vec4<f32>(0.0);
    var s6 = vec4<f32>(0.0);
    var s7 = vec4<f32>(0.0);
    for (var quad = 0u; quad < half_quads; quad++) {
      let at = 2u * quad * ROWS + lane;
      let q = Four(
        transpose(mat4x4<f32>(queries[at], queries[at + 8u], queries[at + 16u], queries[at + 24u])),
        transpose(mat4x4<f32>(queries[at + 32u], queries[at + 40u], queries[at + 48u], queries[at + 56u])));
      s0 += score(q, kv_head, near.x, quad);
      s1 += score(q, kv_head, near.y, quad);
      s2 += score(q, kv_head, near.z, quad);
      s3 += score(q, kv_head, near.w, quad);
      s4 += score(q, kv_head, far.x, quad);
      s5 += score(q, kv_head, far.y, quad);
      s6 += score(q, kv_head, far.z, quad);
      s7 += score(q, kv_head, far.w, quad);
    }
    s0 = select(vec4<f32>(NEVER), s0, visible(first, own, seen_from));
    s1 = select(vec4<f32>(NEVER), s1, visible(first + 1u, own, seen_from));
    s2 = select(vec4<f32>(NEVER), s2, visible(first + 2u, own, seen_from));
    s3 = select(vec4<f32>(NEVER), s3, visible(first + 3u, own, seen_from));
    s4 = select(vec4<f32>(NEVER), s4, visible(first + 4u, own, seen_from));
    s5 = select(vec4<f32>(NEVER), s5, visible(first + 5u, own, seen_from));
    s6 = select(vec4<f32>(NEVER), s6, visible(first + 6u, own, seen_from));
    s7 = select(vec4<f32>(NEVER), s7, visible(first + 7u, own, seen_from));
    let new_max = max(running_max, max(max(max(s0, s1), max(s2, s3)), max(max(s4, s5), max(s6, s7))));
    let correction = exp(running_max - new_max);
    running_max = new_max;
    s0 = exp(s0 - new_max);  // NEVER becomes 0; or 1 before a row has seen a position, which the first correction sets to 0
    s1 = exp(s1 - new_max);
    s2 = exp(s2 - new_max);
    s3 = exp(s3 - new_max);
    s4 = exp(s4 - new_max);
    s5 = exp(s5 - new_max);
    s6 = exp(s6 - new_max);
    s7 = exp(s7 - new_max);
    sum = sum * correction + (s0 + s1 + s2 + s3) + (s4 + s5 + s6 + s7);
    for (var quad = 0u; quad < half_quads; quad++) {
      let at = 2u * quad * ROWS + lane;
      var m = Four(
        scaled(transpose(mat4x4<f32>(mixed[at], mixed[at + 8u], mixed[at + 16u], mixed[at + 24u])), correction),
        scaled(transpose(mat4x4<f32>(mixed[at + 32u], mixed[at + 40u], mixed[at + 48u], mixed[at + 56u])), correction));
      add(&m, s0, kv_head, near.x, quad);
      add(&m, s1, kv_head, near.y, quad);
      add(&m, s2, kv_head, near.z, quad);
      add(&m, s3, kv_head, near.w, quad);
      add(&m, s4, kv_head, far.x, quad);
      add(&m, s5, kv_head, far.y, quad);
      add(&m, s6, kv_head, far.z, quad);
      add(&m, s7, kv_head, far.w, quad);
      let lo = transpose(m.lo);
      let hi = transpose(m.hi);
      mixed[at] = lo[0];
      mixed[at + 8u] = lo[1];
      mixed[at + 16u] = lo[2];
      mixed[at + 24u] = lo[3];
      mixed[at + 32u] = hi[0];
      mixed[at + 40u] = hi[1];
      mixed[at + 48u] = hi[2];
      mixed[at + 56u] = hi[3];
    }
  }

  let stride = 8u * half_quads + 2u;
  for (var r = 0u; r < 4u; r++) {
    let token = first_token + rows[r] / heads;
    if (rows[r] < tokens_per_group * heads && token <= last_token) {
      let out = (token * params.n_heads + kv_head * heads + rows[r] % heads) * stride;
      for (var quad = 0u; quad < half_quads; quad++) {
        let at = 2u * quad * ROWS + rows[r];
        for (var k = 0u; k < 4u; k++) {
          partial[out + 4u * quad + k] = mixed[at][k];
          partial[out + 4u * (half_quads + quad) + k] = mixed[at + ROWS][k];
        }
      }
      partial[out + stride - 2u] = running_max[r];
      partial[out + stride - 1u] = sum[r];
    }
  }
}
