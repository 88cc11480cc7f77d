// softmax(q k^T / sqrt(head_dim)) v over the positions up to each token's own, or the last `window` of them, for many
// tokens: attention's result, for attention_combine to join. The tokens' own keys are in the cache already.
// A workgroup takes ROWS pairs of (token, head), heads that share a kv head side by side, and goes through every
// n_splits-th tile of POSITIONS with a running maximum and sum (Dao 2022). A tile's keys, then its values, are in
// workgroup memory, on their way there while the others are used. All in f32.
// Dispatch: (n_kv_heads, ceil(tokens / tokens_per_group), n_splits).

//#import state
//#import pairs
//#import pages
//#import heads
//#import cache

override tokens_per_group: u32;  // ROWS / heads of a kv head
override n_splits: u32;
override window: u32;  // positions that a token sees; 0: all
override row_quads: u32;   // 2 * half_quads * ROWS: of the rows' queries, and of a tile of keys

struct Params {
  n_heads: u32,
  n_kv_heads: u32,
  head_dim: u32,
  max_pos: u32,
  blocks_per_table: u32,
  scale: f32,  // 1 / sqrt(head_dim)
}

const NEVER = -1e30;  // below every score; not infinite, so that differences of two stay numbers
const LANES = 128u;
const ROWS = 32u;
const POSITIONS = 32u;
const COLUMNS = 16u;    // of lanes: two positions each when scores are taken, then one or two quads of values
const ROW_GROUPS = 8u;  // of the rows i, i + 8, i + 16, i + 24, a vector of four

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> state: State;
@group(0) @binding(2) var<storage, read> y: array<f32>;  // (tokens, rows of q | k | v)
@group(0) @binding(3) var<storage, read> rope: array<vec2<f32>>;
@group(0) @binding(4) var<storage, read> k_cache: array<vec4<u32>>;
@group(0) @binding(5) var<storage, read> v_cache: array<vec4<u32>>;
@group(0) @binding(6) var<storage, read_write> partial: array<f32>;  // (tokens, n_heads, n_splits, 8 half_quads + 2)
@group(0) @binding(7) var<storage, read> blocks: array<u32>;  // (blocks_per_table,)

var<workgroup> queries: array<vec4<f32>, row_quads>;  // (quads, ROWS)
var<workgroup> tile: array<vec4<f32>, row_quads>;     // keys (quads, POSITIONS), then values (POSITIONS, quads)
var<workgroup> weights: array<vec4<f32>, 256>;        // (POSITIONS, ROW_GROUPS)
var<workgroup> maxima: array<vec4<f32>, LANES>;       // (COLUMNS, ROW_GROUPS)

struct Fetched { packed: vec4<u32>, scale: vec2<f32> }
struct Four { a: Fetched, b: Fetched, c: Fetched, d: Fetched }  // what a lane has on its way

// Quad i of a tile is this one of a row; positions beyond the last are read as the last one and get no weight.
fn key_quad(i: u32) -> u32 { return min(i / POSITIONS, half_quads - 1u); }
fn value_quad(i: u32) -> u32 { return i % half_quads; }

fn fetch_key(kv_head: u32, first: u32, last: u32, i: u32) -> Fetched {
  let row = cache_row(kv_head, min(first + i % POSITIONS, last));
  return Fetched(k_cache[vector_at(row, key_quad(i), key_bits)], vec2<f32>(key_scale(row)));
}

fn fetch_value(kv_head: u32, first: u32, last: u32, i: u32) -> Fetched {
  let row = cache_row(kv_head, min(first + i / half_quads, last));
  return Fetched(v_cache[vector_at(row, value_quad(i), value_bits)], value_scale(row));
}

fn keys(kv_head: u32, first: u32, last: u32, lane: u32) -> Four {
  var k: Four;
  k.a = fetch_key(kv_head, first, last, lane);
  if (half_quads > 4u) { k.b = fetch_key(kv_head, first, last, lane + LANES); }
  if (half_quads > 8u) { k.c = fetch_key(kv_head, first, last, lane + 2u * LANES); }
  if (half_quads > 12u) { k.d = fetch_key(kv_head, first, last, lane + 3u * LANES); }
  return k;
}

fn values(kv_head: u32, first: u32, last: u32, lane: u32) -> Four {
  var v: Four;
  v.a = fetch_value(kv_head, first, last, lane);
  if (half_quads > 4u) { v.b = fetch_value(kv_head, first, last, lane + LANES); }
  if (half_quads > 8u) { v.c = fetch_value(kv_head, first, last, lane + 2u * LANES); }
  if (half_quads > 12u) { v.d = fetch_value(kv_head, first, last, lane + 3u * LANES); }
  return v;
}

fn keep_key(i: u32, fetched: Fetched) {
  if (i < POSITIONS * half_quads) {
    let k = unpack(fetched.packed, key_quad(i), key_bits);
    tile[i] = k.lo * fetched.scale.x;  // (quads, POSITIONS): i is quad * POSITIONS + position
    tile[i + half_quads * POSITIONS] = k.hi * fetched.scale.y;
  }
}

fn keep_value(i: u32, fetched: Fetched) {
  if (i < POSITIONS * half_quads) {
    let v = unpack(fetched.packed, value_quad(i), value_bits);
    let at = i / half_quads * 2u * half_quads + i % half_quads;
    tile[at] = v.lo * fetched.scale.x;
    tile[at + half_quads] = v.hi * fetched.scale.y;
  }
}

// What positions add to the values of four rows, by row: v times each row's weight.
fn outer(v: vec4<f32>, weight: vec4<f32>) -> mat4x4<f32> {
  return mat4x4<f32>(v * weight.x, v * weight.y, v * weight.z, v * weight.w);
}

fn write_quad(at: u32, v: vec4<f32>) {
  partial[at] = v.x;
  partial[at + 1u] = v.y;
  partial[at + 2u] = v.z;
  partial[at + 3u] = v.w;
}

@compute @workgroup_size(LANES)
fn main(@builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) group: vec3<u32>) {
  let kv_head = group.x;
  let heads = params.n_heads / params.n_kv_heads;
  let first_token = group.y * tokens_per_group;
  if (first_token >= state.n_tokens) { return; }
  let quads = 2u * half_quads;
  let last_token = min(first_token + tokens_per_group, state.n_tokens) - 1u;
  let last = state.pos + last_token;
  for (var i = lane; i < ROWS * half_quads; i += LANES) {
    let row = i % ROWS;
    let quad = i / ROWS;
    let token = min(first_token + row / heads, last_token);  // rows past the last repeat it and are not written
    let q = rotated(projected(token, kv_head * heads + row % heads, quad), state.pos + token, quad);
    queries[quad * ROWS + row] = q.lo * params.scale;
    queries[(quad + half_quads) * ROWS + row] = q.hi * params.scale;
  }

  let row_group = lane % ROW_GROUPS;
  let column = lane / ROW_GROUPS;
  let rows = row_group + ROW_GROUPS * vec4<u32>(0u, 1u, 2u, 3u);
  let own = state.pos + min(first_token + rows / heads, vec4<u32>(last_token));  // the rows' last positions
  var seen_from = vec4<u32>(0u);
  var begin = group.z * POSITIONS;
  if (window > 0u) {  // tiles that no row sees are passed over
    seen_from = own + 1u - min(own + 1u, vec4<u32>(window));
    let length = state.pos + first_token + 1u;
    begin += (length - min(length, window)) / POSITIONS * POSITIONS;
  }
  var running_max = vec4<f32>(NEVER);
  var sum = vec4<f32>(0.0);
  var near_mixed = mat4x4<f32>();  // quad `column` of the values, by row
  var far_mixed = mat4x4<f32>();   // and quad COLUMNS + column
  var k = keys(kv_head, begin, last, lane);
  for (var first = begin; first <= last; first += n_splits * POSITIONS) {
    keep_key(lane, k.a);
    if (half_quads > 4u) { keep_key(lane + LANES, k.b); }
    if (half_quads > 8u) { keep_key(lane + 2u * LANES, k.c); }
    if (half_quads > 12u) { keep_key(lane + 3u * LANES, k.d); }
    let v = values(kv_head, first, last, lane);
    workgroupBarrier();
    var near = vec4<f32>(0.0);  // scores of the rows at position `column`
    var far = vec4<f32>(0.0);   // and at COLUMNS + column
    for (var quad = 0u; quad < quads; quad++) {
      let k0 = tile[quad * POSITIONS + column];
      let k1 = tile[quad * POSITIONS + COLUMNS + column];
      let at = quad * ROWS + row_group;
      let q = mat4x4<f32>(queries[at], queries[at + 8u], queries[at + 16u], queries[at + 24u]);
      near += vec4<f32>(dot(q[0], k0), dot(q[1], k0), dot(q[2], k0), dot(q[3], k0));
      far += vec4<f32>(dot(q[0], k1), dot(q[1], k1), dot(q[2], k1), dot(q[3], k1));
    }
    let pos = vec4<u32>(first + column);
    near = select(vec4<f32>(NEVER), near, pos <= own & pos >= seen_from);
    far = select(vec4<f32>(NEVER), far, pos + COLUMNS <= own & pos + COLUMNS >= seen_from);
    maxima[lane] = max(near, far);
    workgroupBarrier();
    var new_max = running_max;
    for (var i = 0u; i < COLUMNS; i++) { new_max = max(new_max, maxima[i * ROW_GROUPS + row_group]); }
    let correction = exp(running_max - new_max);
    running_max = new_max;
    // NEVER becomes 0. Until a row has seen a position all is 1, which the first correction or, if this split has none
    // for it, attention_combine sets to 0.
    weights[lane] = exp(near - new_max);
    weights[lane + LANES] = exp(far - new_max);
    keep_value(lane, v.a);
    if (half_quads > 4u) { keep_value(lane + LANES, v.b); }
    if (half_quads > 8u) { keep_value(lane + 2u * LANES, v.c); }
    if (half_quads > 12u) { keep_value(lane + 3u * LANES, v.d); }
    k = keys(kv_head, first + n_splits * POSITIONS, last, lane);
    workgroupBarrier();
    sum *= correction;
    near_mixed = mat4x4<f32>(near_mixed[0] * correction.x, near_mixed[1] * correction.y,
                             near_mixed[2] * correction.z, near_mixed[3] * correction.w);
    if (half_quads > 8u) {
      far_mixed = mat4x4<f32>(far_mixed[0] * correction.x, far_mixed[1] * correction.y,
                              far_mixed[2] * correction.z, far_mixed[3] * correction.w);
    }
    for (var i = 0u; i < POSITIONS; i++) {
      let weight = weights[i * ROW_GROUPS + row_group];
      sum += weight;
      near_mixed += outer(tile[i * quads + min(column, quads - 1u)], weight);
      if (half_quads > 8u) { far_mixed += outer(tile[i * quads + min(COLUMNS + column, quads - 1u)], weight); }
    }
    workgroupBarrier();
  }

  let stride = 8u * half_quads + 2u;
  for (var r = 0u; r < 4u; r++) {
    let token = first_token + rows[r] / heads;
    if (rows[r] < tokens_per_group * heads && token <= last_token) {
      let head = kv_head * heads + rows[r] % heads;
      let out = ((token * params.n_heads + head) * n_splits + group.z) * stride;
      if (column < quads) { write_quad(out + 4u * column, near_mixed[r]); }
      if (COLUMNS + column < quads) { write_quad(out + 4u * (COLUMNS + column), far_mixed[r]); }
      if (column == 0u) {
        partial[out + stride - 2u] = running_max[r];
        partial[out + stride - 1u] = sum[r];
      }
    }
  }
}
