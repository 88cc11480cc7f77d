// softmax(q k^T / sqrt(head_dim)) v over the positions up to each token's own, for many tokens: attention's result
// with one split, so attention_combine comes after it here as well. The tokens' own keys are in the cache already.
// A workgroup takes ROWS pairs of (token, head), heads that share a kv head side by side, and goes through the
// positions, POSITIONS at a time, with a running maximum and sum (Dao 2022): keys, then values, in workgroup memory.
// All in f32. Dispatch: (n_kv_heads, ceil(tokens / tokens_per_group)).

//#import state
//#import heads

override tokens_per_group: u32;  // ROWS / heads of a kv head
override lane_quads: u32;        // ceil(half_padded / 2 / COLUMNS): quads of values that a lane adds up, 1..MAX_QUADS
override row_quads: u32;         // ROWS * half_padded / 2: quads of the rows' queries, and of as many keys

struct Params {
  n_heads: u32,
  n_kv_heads: u32,
  head_dim: u32,
  half_padded: u32,
  max_pos: u32,
  scale: f32,  // 1 / sqrt(head_dim)
}

const NEVER = -1e30;  // below every score; not infinite, so that differences of two stay numbers
const LANES = 128u;
const ROWS = 32u;
const POSITIONS = 32u;
const ROW_GROUPS = 8u;    // of the rows i, i + 8, i + 16, i + 24, a vector of four
const COLUMNS = 16u;      // of lanes: two positions each when scores are taken, then quads of values
const MAX_QUADS = 4u;     // head_dim up to 256

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> state: State;
@group(0) @binding(2) var<storage, read> y: array<f32>;  // (tokens, rows of q | k | v)
@group(0) @binding(3) var<storage, read> rope: array<vec2<f32>>;
@group(0) @binding(4) var<storage, read> k_cache: array<vec4<u32>>;
@group(0) @binding(5) var<storage, read> v_cache: array<vec4<u32>>;
@group(0) @binding(6) var<storage, read_write> partial: array<f32>;  // (tokens, n_heads, 2 half_padded + 2)

var<workgroup> queries: array<vec4<f32>, row_quads>;  // (quads, ROWS)
var<workgroup> tile: array<vec4<f32>, row_quads>;     // keys (quads, POSITIONS), then values (POSITIONS, quads)
var<workgroup> weights: array<vec4<f32>, 256>;        // (POSITIONS, ROW_GROUPS)
var<workgroup> maxima: array<vec4<f32>, LANES>;       // (COLUMNS, ROW_GROUPS)

fn unpack_f16(v: vec4<u32>) -> Pair {
  let a = unpack2x16float(v.x);
  let b = unpack2x16float(v.y);
  let c = unpack2x16float(v.z);
  let d = unpack2x16float(v.w);
  return Pair(vec4<f32>(a.x, b.x, c.x, d.x), vec4<f32>(a.y, b.y, c.y, d.y));
}

@compute @workgroup_size(LANES)
fn main(@builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) group: vec3<u32>) {
  let kv_head = group.x;
  let heads = params.n_heads / params.n_kv_heads;
  let first_token = group.y * tokens_per_group;
  if (first_token >= state.n_tokens) { return; }
  let half_quads = params.half_padded / 4u;
  let quads = 2u * half_quads;
  let last_token = min(first_token + tokens_per_group, state.n_tokens) - 1u;
  let length = state.pos + last_token + 1u;
  for (var i = lane; i < ROWS * half_quads; i += LANES) {
    let row = i % ROWS;
    let quad = i / ROWS;
    let token = min(first_token + row / heads, last_token);  // rows past the last repeat it and are not written
    let q = rotated(projected(token, kv_head * heads + row % heads, quad), state.pos + token, quad);
    queries[quad * ROWS + row] = q.lo;
    queries[(quad + half_quads) * ROWS + row] = q.hi;
  }

  let row_group = lane % ROW_GROUPS;
  let column = lane / ROW_GROUPS;
  let rows = row_group + ROW_GROUPS * vec4<u32>(0u, 1u, 2u, 3u);
  let own = state.pos + min(first_token + rows / heads, vec4<u32>(last_token));  // the rows' last positions
  var running_max = vec4<f32>(NEVER);
  var sum = vec4<f32>(0.0);
  var mixed: array<array<vec4<f32>, 4>, MAX_QUADS>;  // by quad, by row
  for (var first = 0u; first < length; first += POSITIONS) {
    for (var i = lane; i < POSITIONS * half_quads; i += LANES) {
      let at = i % POSITIONS;
      let quad = i / POSITIONS;
      let k = unpack_f16(k_cache[k_index(kv_head, min(first + at, length - 1u), quad)]);
      tile[quad * POSITIONS + at] = k.lo;
      tile[(quad + half_quads) * POSITIONS + at] = k.hi;
    }
    workgroupBarrier();
    var near = vec4<f32>(0.0);  // scores of the rows at position `column`
    var far = vec4<f32>(0.0);   // and at COLUMNS + column
    for (var quad = 0u; quad < quads; quad++) {
      let k0 = tile[quad * POSITIONS + column];
      let k1 = tile[quad * POSITIONS + COLUMNS + column];
      for (var r = 0u; r < 4u; r++) {
        let q = queries[quad * ROWS + row_group + ROW_GROUPS * r];
        near[r] += dot(q, k0);
        far[r] += dot(q, k1);
      }
    }
    let pos = vec4<u32>(first + column);
    near = select(vec4<f32>(NEVER), near * params.scale, pos <= own);
    far = select(vec4<f32>(NEVER), far * params.scale, pos + COLUMNS <= own);
    maxima[lane] = max(near, far);
    workgroupBarrier();
    var new_max = running_max;
    for (var i = 0u; i < COLUMNS; i++) { new_max = max(new_max, maxima[i * ROW_GROUPS + row_group]); }
    let correction = exp(running_max - new_max);
    running_max = new_max;
    weights[lane] = exp(near - new_max);  // NEVER becomes 0: position 0 is every row's
    weights[lane + LANES] = exp(far - new_max);
    for (var i = lane; i < POSITIONS * half_quads; i += LANES) {
      let at = i / half_quads;
      let quad = i % half_quads;
      let v = unpack_f16(v_cache[v_index(kv_head, min(first + at, length - 1u), quad)]);
      tile[at * quads + quad] = v.lo;
      tile[at * quads + quad + half_quads] = v.hi;
    }
    workgroupBarrier();
    sum *= correction;
    for (var j = 0u; j < lane_quads; j++) {
      for (var r = 0u; r < 4u; r++) { mixed[j][r] *= correction[r]; }
    }
    for (var i = 0u; i < POSITIONS; i++) {
      let weight = weights[i * ROW_GROUPS + row_group];
      sum += weight;
      for (var j = 0u; j < lane_quads; j++) {
        if (column + COLUMNS * j < quads) {
          let v = tile[i * quads + column + COLUMNS * j];
          for (var r = 0u; r < 4u; r++) { mixed[j][r] += weight[r] * v; }
        }
      }
    }
    workgroupBarrier();
  }

  let stride = 2u * params.half_padded + 2u;
  for (var r = 0u; r < 4u; r++) {
    let token = first_token + rows[r] / heads;
    if (rows[r] < tokens_per_group * heads && token <= last_token) {
      let out = (token * params.n_heads + kv_head * heads + rows[r] % heads) * stride;
      for (var j = 0u; j < lane_quads; j++) {
        let quad = column + COLUMNS * j;
        if (quad < quads) {
          for (var k = 0u; k < 4u; k++) { partial[out + 4u * quad + k] = mixed[j][r][k]; }
        }
      }
      if (column == 0u) {
        partial[out + stride - 2u] = running_max[r];
        partial[out + stride - 1u] = sum[r];
      }
    }
  }
}
