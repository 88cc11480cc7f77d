// softmax(scale q k^T) v over the positions up to each token's own, or the last `window` of them. q and k are first rotated to their
// positions (RoFormer eq. 34; pairs (i, i + head_dim / 2), as Hugging Face stores them), k and v put into the cache.
// In splits: every split sees each n_splits-th tile of positions and keeps a running maximum and sum (Flash-Decoding);
// attention_combine joins them. All in f32, whatever the cache keeps (shared/cache.wgsl).
// Tokens are of one sequence, or with `batched` and `paged` each of its own, or some.
// For CPUs, and GPUs where attention_group cannot be: heads beyond 256, little workgroup memory.
// One workgroup = one split of one head of one token. Dispatch: (n_splits, n_heads, tokens). With `finish`, for heads of
// whole blocks of 32, the last split of a head joins them itself and writes int8 digits (shared/last.wgsl says where).

//#import state
//#import digits
//#import quantized
//#import quantize
//#import last
//#import pairs
//#import rows
//#import pages
//#import cache
//#import cache_store
//#import splits

override per_lane: u32;  // neighbouring positions that one lane scores, 1..4, of one block; lanes * per_lane are a tile
override n_splits: u32;
override finish: bool;   // then lanes are at least head_dim / 4
override window: u32;  // positions that a token sees; 0: all

struct Params {
  n_heads: u32,
  n_kv_heads: u32,
  head_dim: u32,
  max_pos: u32,      // of the cache
  tokens: u32,
  blocks_per_table: u32,
  scale: f32,
}

const MAXIMA = 16u;      // lanes that look for the largest score first; there are as many or more
const VALUES = 4u;       // loads of values that a lane has under way at once

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> state: State;
@group(0) @binding(2) var<storage, read> y: array<f32>;                    // (splits, tokens, rows of q | k | v)
@group(0) @binding(3) var<storage, read> rope: array<vec2<f32>>;           // (positions, head_dim / 2): cos, sin
@group(0) @binding(4) var<storage, read_write> k_cache: array<vec4<u32>>;
@group(0) @binding(5) var<storage, read_write> v_cache: array<vec4<u32>>;
@group(0) @binding(6) var<storage, read_write> partial: array<atomic<u32>>;  // f32 (tokens, n_heads, n_splits, 8 half_quads + 2)
@group(0) @binding(7) var<storage, read_write> arrived: array<atomic<u32>>;  // (tokens, n_heads)
@group(0) @binding(8) var<storage, read_write> x_digits: array<u32>;
@group(0) @binding(9) var<storage, read_write> x_scale: array<vec2<f32>>;
@group(0) @binding(10) var<storage, read> pass_rows: array<PassRow>;  // of a batch, like the next
@group(0) @binding(11) var<storage, read> blocks: array<u32>;         // (tokens, blocks_per_table), and a tile beyond

var<workgroup> query_lo: array<vec4<f32>, half_quads>;
var<workgroup> query_hi: array<vec4<f32>, half_quads>;
var<workgroup> weights: array<vec4<f32>, lanes>;
var<workgroup> lane_max: array<f32, lanes>;
var<workgroup> maxima: array<f32, MAXIMA>;
var<workgroup> group_lo: array<vec4<f32>, lanes>;
var<workgroup> group_hi: array<vec4<f32>, lanes>;
var<workgroup> group_sum: array<f32, lanes>;

// Puts into the cache what the workgroup is going to read and no earlier pass has written. Heads that share a kv head,
// and later tokens of the sequence, write the same: it is the same arithmetic on the same numbers, so whichever write comes
// last leaves the same bits, and nobody waits for another workgroup.
fn write_cache(lane: u32, split: u32, kv_head: u32, token: u32) {
  let n_sources = lanes / half_quads;  // at a time; the first lanes, which have the query, come last
  let i = lane % half_quads;
  for (var begin = first_of_sequence(token); begin <= token; begin += n_sources) {
    let source = begin + (lane / half_quads + n_sources - 1u) % n_sources;
    var pos = 0u;
    var is_mine = lane < n_sources * half_quads && source <= token;
    if (is_mine) {
      pos = row_position(source);
      is_mine = pos / (lanes * per_lane) % n_splits == split;
    }
    var k: Pair;
    var v: Pair;
    if (is_mine) {
      k = rotated(projected(source, params.n_heads + kv_head, i), pos, i);
      v = projected(source, params.n_heads + params.n_kv_heads + kv_head, i);
    }
    var most = vec3<f32>(0.0);
    if (min(key_bits, value_bits) < 16u) {
      weights[lane] = vec4<f32>(largest_of(k, v), 0.0);
      workgroupBarrier();
      for (var n = lane - i; n < min(lane - i + half_quads, lanes); n++) { most = max(most, weights[n].xyz); }
      workgroupBarrier();
    }
    if (is_mine) {
      let row = kv_head * params.max_pos + cache_position(source, pos);
      store_key(row, i, k, most.x);
      store_value(row, i, v, most.yz);
    }
  }
}

// Something of every 128 bytes of a position's keys and values, in `row` of the cache: they come from far away, and are on
// their way while q is made. Sums that nobody uses would not be loaded.
fn touch(row: u32) -> u32 {
  var sum = 0u;
  for (var i = 0u; i < row_vectors(key_bits); i += 8u) { sum += k_cache[row * row_vectors(key_bits) + i].x; }
  for (var i = 0u; i < row_vectors(value_bits); i += 8u) { sum += v_cache[row * row_vectors(value_bits) + i].x; }
  return sum;
}

// Scores of the positions pos .. pos + per_lane - 1: q is loaded once for all of them. In place of those that there are
// not the last one is scored, so that no load waits for a branch.
fn scores_at(token: u32, first_row: u32, pos: u32, length: u32, seen_from: u32) -> vec4<f32> {
  let there = min(pos, length - 1u);
  let row = first_row + cache_position(token, there);
  let more = length - 1u - there;  // positions beyond
  var sums = vec4<f32>(0.0);
  for (var i = 0u; i < half_quads; i++) {
    let lo = query_lo[i];
    let hi = query_hi[i];
    for (var j = 0u; j < per_lane; j++) {
      let k = key(row + min(j, more), i);
      sums[j] += dot(lo, k.lo) + dot(hi, k.hi);
    }
  }
  if (key_bits < 16u) {
    for (var j = 0u; j < per_lane; j++) { sums[j] *= key_scale(row + min(j, more)); }
  }
  let j = vec4<u32>(0u, 1u, 2u, 3u);
  var scored = (j < vec4<u32>(per_lane)) & (vec4<u32>(pos) + j < vec4<u32>(length));
  if (window > 0u) { scored &= vec4<u32>(pos) + j >= vec4<u32>(seen_from); }
  return select(vec4<f32>(NEVER), sums * params.scale, scored);
}

fn max_over_lanes(lane: u32, value: f32) -> f32 {
  lane_max[lane] = value;
  workgroupBarrier();
  if (lane < MAXIMA) {
    var largest = NEVER;
    for (var i = lane; i < lanes; i += MAXIMA) { largest = max(largest, lane_max[i]); }
    maxima[lane] = largest;
  }
  workgroupBarrier();
  var largest = NEVER;
  for (var i = 0u; i < MAXIMA; i++) { largest = max(largest, maxima[i]); }
  return largest;
}

@compute @workgroup_size(lanes)
fn main(@builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) group: vec3<u32>) {
  let split = group.x;
  let head = group.y;
  let token = group.z;
  if (token >= state.n_tokens) { return; }
  let length = row_position(token) + 1u;
  let n_used = min(n_splits, (length + lanes * per_lane - 1u) / (lanes * per_lane));  // splits that have positions
  if (finish && split >= n_used) { return; }
  let kv_head = head / (params.n_heads / params.n_kv_heads);
  let first_row = kv_head * params.max_pos;
  if (lane < half_quads) {
    let query = rotated(projected(token, head, lane), length - 1u, lane);
    query_lo[lane] = query.lo;
    query_hi[lane] = query.hi;
  }
  if (per_lane == 1u) {
    let first = min(split * lanes + lane, length - 1u);
    lane_max[lane] = f32(touch(first_row + cache_position(token, first)));  // to be overwritten
  }
  write_cache(lane, split, kv_head, token);
  storageBarrier();
  workgroupBarrier();

  let n_groups = lanes / half_quads;  // groups of lanes, each of which adds up its share of the positions' values
  let my_group = lane / half_quads;
  let quad = lane % half_quads;
  var running_max = NEVER;
  var sum = 0.0;
  var lo = vec4<f32>(0.0);
  var hi = vec4<f32>(0.0);
  let tile_size = lanes * per_lane;
  var seen_from = 0u;
  var tile = split * tile_size;
  if (window > 0u) {  // skip this split's tiles that are not seen
    seen_from = length - min(length, window);
    let round = n_splits * tile_size;
    tile += seen_from / round * round;
    if (tile + tile_size <= seen_from) { tile += round; }
  }
  for (; tile < length; tile += n_splits * tile_size) {
    let pos = tile + per_lane * lane;
    let scores = scores_at(token, first_row, pos, length, seen_from);
    let tile_max = max_over_lanes(lane, max(max(scores.x, scores.y), max(scores.z, scores.w)));
    let new_max = max(running_max, tile_max);
    let correction = exp(running_max - new_max);
    running_max = new_max;
    weights[lane] = exp(scores - new_max);  // NEVER becomes 0
    workgroupBarrier();
    sum *= correction;
    lo *= correction;
    hi *= correction;
    if (my_group < n_groups) {
      let n = min(tile_size, length - tile);
      for (var first = my_group; first < n; first += VALUES * n_groups) {
        for (var k = 0u; k < VALUES; k++) {
          let i = first + k * n_groups;
          let there = min(i, n - 1u);
          let row = first_row + cache_position(token, tile + there);
          let weight = select(0.0, weights[there / per_lane][there % per_lane], i < n);
          let v = value(row, quad);
          let scaled_weight = weight * value_scale(row);
          sum += weight;
          lo += scaled_weight.x * v.lo;
          hi += scaled_weight.y * v.hi;
        }
      }
    }
    workgroupBarrier();
  }

  group_sum[lane] = sum;
  group_lo[lane] = lo;
  group_hi[lane] = hi;
  workgroupBarrier();
  if (lane < half_quads) {
    for (var i = lane + half_quads; i < n_groups * half_quads; i += half_quads) {
      sum += group_sum[i];
      lo += group_lo[i];
      hi += group_hi[i];
    }
  }
  let head_quads = params.head_dim / 4u;
  let place = select(0xFFFFFFFFu, head * head_quads + lane, lane < head_quads);
  let n_blocks = params.n_heads * params.head_dim / 32u;
  if (finish && n_used == 1u) {
    workgroupBarrier();
    if (lane < half_quads) {
      group_lo[lane] = lo / sum;
      group_hi[lane] = hi / sum;
    }
    workgroupBarrier();
    var v = vec4<f32>(0.0);
    if (lane < half_quads) { v = group_lo[lane]; } else if (lane < head_quads) { v = group_hi[lane - half_quads]; }
    quantize4(v, lane, token, place, n_blocks);
    return;
  }
  let stride = 8u * half_quads + 2u;
  let slot = token * params.n_heads + head;
  let out = (slot * n_splits + split) * stride;
  if (lane < half_quads) {
    for (var k = 0u; k < 4u; k++) {
      store_partial(out + 4u * lane + k, lo[k]);
      store_partial(out + 4u * (half_quads + lane) + k, hi[k]);
    }
  }
  if (lane == 0u) {
    store_partial(out + stride - 2u, running_max);
    store_partial(out + stride - 1u, sum);
  }
  if (finish && last_to_arrive(lane, slot, n_used)) {
    let first = slot * n_splits * stride;
    var largest = NEVER;
    for (var s = 0u; s < n_used; s++) { largest = max(largest, load_partial(first + s * stride + stride - 2u)); }
    var v = vec4<f32>(0.0);
    var total = 0.0;
    if (lane < head_quads) {
      for (var s = 0u; s < n_used; s++) {
        let at = first + s * stride;
        let share = exp(load_partial(at + stride - 2u) - largest);
        total += share * load_partial(at + stride - 1u);
        for (var k = 0u; k < 4u; k++) { v[k] += share * load_partial(at + 4u * lane + k); }
      }
      v = v / total;
    }
    quantize4(v, lane, token, place, n_blocks);
  }
}
