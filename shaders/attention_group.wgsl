// attention for GPUs: the same result, cut up so that a cache is read once and in whole lines. Heads that share a kv head
// share a workgroup, up to four of them, the components of a vec4; and neighbouring lanes load neighbouring vectors: a lane
// takes one quad of four positions of a tile, which are under way together, those of the next tile while this one is scored.
// What lanes have of a score passes through workgroup memory, where a lane adds it up for one position and one head.
// One workgroup = one split of some heads of a token. Dispatch: (n_splits, n_kv_heads * groups of a kv head's heads, tokens).

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

override heads: u32;     // of a workgroup, 1..4, all of one kv head
override n_splits: u32;
override alone: u32;     // tiles up to which one split takes them all, and there is nothing to join
override finish: bool;
override window: u32;    // positions that a token sees; 0: all

struct Params {
  n_heads: u32,
  n_kv_heads: u32,
  head_dim: u32,
  max_pos: u32,      // of the cache
  tokens: u32,
  blocks_per_table: u32,
  scale: f32,
}

const PARTS = 32u;    // lanes are a multiple, and at least 8 half_quads

// A tile is four positions of each of the groups of half_quads lanes that there are.
override n_groups: u32 = lanes / half_quads;
override tile_size: u32 = 4u * n_groups;
override stride: u32 = half_quads | 1u;  // of a position's shares: odd, for lanes of eight positions to meet in no bank

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> state: State;
@group(0) @binding(2) var<storage, read> y: array<f32>;                    // (splits, tokens, rows of q | k | v)
@group(0) @binding(3) var<storage, read> rope: array<vec2<f32>>;           // (positions, head_dim / 2): cos, sin
@group(0) @binding(4) var<storage, read_write> k_cache: array<vec4<u32>>;
@group(0) @binding(5) var<storage, read_write> v_cache: array<vec4<u32>>;
@group(0) @binding(6) var<storage, read_write> partial: array<atomic<u32>>;  // f32 (tokens, n_heads, n_splits, 8 half_quads + 2)
@group(0) @binding(7) var<storage, read_write> arrived: array<atomic<u32>>;  // (tokens, groups of heads)
@group(0) @binding(8) var<storage, read_write> x_digits: array<u32>;
@group(0) @binding(9) var<storage, read_write> x_scale: array<vec2<f32>>;
@group(0) @binding(10) var<storage, read> pass_rows: array<PassRow>;  // of a batch, like the next
@group(0) @binding(11) var<storage, read> blocks: array<u32>;         // (tokens, blocks_per_table), and a tile beyond

var<workgroup> query_lo: array<vec4<f32>, 4u * half_quads>;  // (heads, half_quads)
var<workgroup> query_hi: array<vec4<f32>, 4u * half_quads>;
var<workgroup> shares: array<vec4<f32>, max(max(tile_size * stride, 4u * lanes), lanes + 2u * n_splits)>;
var<workgroup> weights: array<vec4<f32>, tile_size>;
var<workgroup> of_lane: array<f32, lanes>;
var<workgroup> of_part: array<f32, PARTS>;
var<workgroup> corrections: vec4<f32>;

struct Heads { a: Pair, b: Pair, c: Pair, d: Pair }
struct Row { vectors: Vectors, scale: vec2<f32> }
struct Rows { a: Row, b: Row, c: Row, d: Row }  // of the positions that a lane has under way
struct Own { is_there: bool, key: Row, value: Row }  // what a lane has put into the cache, and so need not wait for

struct Lane {
  token: u32,
  first_row: u32,  // of the kv head's in the cache
  last_pos: u32,   // that there is
  group: u32,
  quad: u32,
}

// In place of a position that there is not the last one is loaded, so that no load waits for a branch.
fn cache_row(l: Lane, tile: u32, j: u32) -> u32 {
  return l.first_row + cache_position(l.token, min(tile * tile_size + l.group + j * n_groups, l.last_pos));
}

fn key_row(row: u32, quad: u32) -> Row { return Row(key_vectors(row, quad), vec2<f32>(key_scale(row))); }

fn value_row(row: u32, quad: u32) -> Row { return Row(value_vectors(row, quad), value_scale(row)); }

fn key_rows(l: Lane, tile: u32) -> Rows {
  return Rows(key_row(cache_row(l, tile, 0u), l.quad), key_row(cache_row(l, tile, 1u), l.quad),
              key_row(cache_row(l, tile, 2u), l.quad), key_row(cache_row(l, tile, 3u), l.quad));
}

fn value_rows(l: Lane, tile: u32) -> Rows {
  return Rows(value_row(cache_row(l, tile, 0u), l.quad), value_row(cache_row(l, tile, 1u), l.quad),
              value_row(cache_row(l, tile, 2u), l.quad), value_row(cache_row(l, tile, 3u), l.quad));
}

fn scaled(row: Row, quad: u32, bits: u32) -> Pair {
  let x = pair_in(row.vectors, quad, bits);
  if (bits >= 16u) { return x; }
  return Pair(x.lo * row.scale.x, x.hi * row.scale.y);
}

fn dot_pair(a: Pair, b: Pair) -> f32 { return dot(a.lo, b.lo) + dot(a.hi, b.hi); }

fn dots(q: Heads, k: Pair) -> vec4<f32> {
  var sums = vec4<f32>(dot_pair(q.a, k), 0.0, 0.0, 0.0);
  if (heads > 1u) { sums.y = dot_pair(q.b, k); }
  if (heads > 2u) { sums.z = dot_pair(q.c, k); }
  if (heads > 3u) { sums.w = dot_pair(q.d, k); }
  return sums;
}

fn add(sum: Pair, weight: f32, v: Pair) -> Pair { return Pair(sum.lo + weight * v.lo, sum.hi + weight * v.hi); }

fn add_all(sums: Heads, w: vec4<f32>, v: Pair) -> Heads {
  var next = sums;
  next.a = add(sums.a, w.x, v);
  if (heads > 1u) { next.b = add(sums.b, w.y, v); }
  if (heads > 2u) { next.c = add(sums.c, w.z, v); }
  if (heads > 3u) { next.d = add(sums.d, w.w, v); }
  return next;
}

fn times(x: Pair, factor: f32) -> Pair { return Pair(x.lo * factor, x.hi * factor); }

fn query(head: u32, quad: u32) -> Pair {
  return Pair(query_lo[head * half_quads + quad], query_hi[head * half_quads + quad]);
}

// Puts into the cache what the workgroup is going to read and no earlier pass has written: of its tiles, which are every
// n_used-th from `first_tile` on. Other workgroups of the kv head, and later tokens of the sequence, write the same: it is
// the same arithmetic on the same numbers, so whichever write comes last leaves the same bits, and nobody waits for another.
// A lane writes what it will read; what it wrote last it also returns.
fn write_cache(l: Lane, lane: u32, kv_head: u32, first_tile: u32, n_used: u32) -> Own {
  var own: Own;
  for (var begin = first_of_sequence(l.token); begin <= l.token; begin += n_groups) {
    let source = begin + (l.group + n_groups - row_position(begin) % n_groups) % n_groups;
    var pos = 0u;
    var is_mine = l.group < n_groups && source <= l.token;
    if (is_mine) {
      pos = row_position(source);
      is_mine = pos / tile_size >= first_tile && (pos / tile_size - first_tile) % n_used == 0u;
    }
    var k: Pair;
    var v: Pair;
    if (is_mine) {
      k = rotated(projected(source, params.n_heads + kv_head, l.quad), pos, l.quad);
      v = projected(source, params.n_heads + params.n_kv_heads + kv_head, l.quad);
    }
    var most = vec3<f32>(0.0);
    if (min(key_bits, value_bits) < 16u) {
      shares[lane] = vec4<f32>(largest_of(k, v), 0.0);
      workgroupBarrier();
      let first = lane - l.quad;
      for (var n = first; n < min(first + half_quads, lanes); n++) { most = max(most, shares[n].xyz); }
      workgroupBarrier();
    }
    if (is_mine) {
      let row = kv_head * params.max_pos + cache_position(source, pos);
      store_key(row, l.quad, k, most.x);
      store_value(row, l.quad, v, most.yz);
      own.key = Row(packed_key(k, most.x), vec2<f32>(packed_key_scale(most.x)));
      own.value = Row(packed_value(v, most.yz), packed_value_scale(most.yz));
      own.is_there = true;
    }
  }
  return own;
}

fn replaced(rows: Rows, j: u32, row: Row) -> Rows {
  var next = rows;
  switch j {
    case 0u: { next.a = row; }
    case 1u: { next.b = row; }
    case 2u: { next.c = row; }
    default: { next.d = row; }
  }
  return next;
}

// Element k of quad c of a head. What this shader joins itself has neighbouring quads side by side, as lanes load them.
fn element(c: u32, k: u32) -> u32 { return select(4u * c + k, 2u * half_quads * k + c, finish); }

fn partial_quad(at: u32, c: u32) -> vec4<f32> {
  return vec4<f32>(load_partial(at + element(c, 0u)), load_partial(at + element(c, 1u)),
                   load_partial(at + element(c, 2u)), load_partial(at + element(c, 3u)));
}

// The largest over the lanes of the same head, lane % 4.
fn max_over_lanes(lane: u32, value: f32) -> f32 {
  of_lane[lane] = value;
  workgroupBarrier();
  if (lane < PARTS) {
    var most = NEVER;
    for (var i = lane; i < lanes; i += PARTS) { most = max(most, of_lane[i]); }
    of_part[lane] = most;
  }
  workgroupBarrier();
  var most = NEVER;
  for (var i = lane % 4u; i < PARTS; i += 4u) { most = max(most, of_part[i]); }
  return most;
}

@compute @workgroup_size(lanes)
fn main(
  @builtin(local_invocation_index) lane: u32,
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) n_workgroups: vec3<u32>,
) {
  let split = group.x;
  let token = group.z;
  if (token >= state.n_tokens) { return; }
  let heads_per_kv = params.n_heads / params.n_kv_heads;
  let groups_per_kv = (heads_per_kv + heads - 1u) / heads;
  let kv_head = group.y / groups_per_kv;
  let first_head = kv_head * heads_per_kv + group.y % groups_per_kv * heads;
  let n_heads = min(heads, (kv_head + 1u) * heads_per_kv - first_head);  // the last group of a kv head may have fewer
  let pos = row_position(token);
  var seen_from = 0u;
  if (window > 0u) { seen_from = pos + 1u - min(pos + 1u, window); }
  let first_tile = seen_from / tile_size;
  let end_tile = pos / tile_size + 1u;
  let n_tiles = end_tile - first_tile;
  let n_used = select(min(n_splits, n_tiles), 1u, n_tiles <= alone);  // splits that have tiles
  if (finish && split >= n_used) { return; }

  let l = Lane(token, kv_head * params.max_pos, pos, lane / half_quads, lane % half_quads);
  var tile = select(end_tile, first_tile + split, split < n_used);
  var keys = key_rows(l, tile);  // they come from far away, and are on their way while q is made
  var values = value_rows(l, tile);
  // Lanes of other warps than have the newest key.
  let q_head = (l.group + 2u * n_groups - pos % n_groups - n_groups / 2u) % n_groups;
  if (l.group < n_groups && q_head < 4u) {
    var q = Pair(vec4<f32>(0.0), vec4<f32>(0.0));
    if (q_head < n_heads) { q = rotated(projected(token, first_head + q_head, l.quad), pos, l.quad); }
    query_lo[q_head * half_quads + l.quad] = q.lo;
    query_hi[q_head * half_quads + l.quad] = q.hi;
  }
  var own = write_cache(l, lane, kv_head, tile, n_used);
  let first_token = first_of_sequence(token);
  if (first_token < token) {  // the pass has more of the sequence, which other lanes may have written
    own.is_there = false;
    storageBarrier();
    workgroupBarrier();
    if (tile < end_tile && (tile + 1u) * tile_size > row_position(first_token)) {
      keys = key_rows(l, tile);
      values = value_rows(l, tile);
    }
  }
  workgroupBarrier();

  let head = lane % 4u;  // whose scores the lane adds up, of every (lanes / 4)-th position
  let nothing = Pair(vec4<f32>(0.0), vec4<f32>(0.0));
  var running_max = NEVER;
  var sum = 0.0;
  var mixed = Heads(nothing, nothing, nothing, nothing);
  for (; tile < end_tile; tile += n_used) {
    if (own.is_there && tile + 1u == end_tile) {
      keys = replaced(keys, pos % tile_size / n_groups, own.key);
      values = replaced(values, pos % tile_size / n_groups, own.value);
    }
    let q = Heads(query(0u, l.quad), query(1u, l.quad), query(2u, l.quad), query(3u, l.quad));
    if (l.group < n_groups) {
      let at = l.group * stride + l.quad;
      shares[at] = dots(q, scaled(keys.a, l.quad, key_bits));
      shares[at + n_groups * stride] = dots(q, scaled(keys.b, l.quad, key_bits));
      shares[at + 2u * n_groups * stride] = dots(q, scaled(keys.c, l.quad, key_bits));
      shares[at + 3u * n_groups * stride] = dots(q, scaled(keys.d, l.quad, key_bits));
    }
    let next = tile + n_used;
    if (next < end_tile) { keys = key_rows(l, next); }
    workgroupBarrier();
    var most = NEVER;
    for (var i = lane / 4u; i < tile_size; i += lanes / 4u) {
      var score = 0.0;
      for (var quad = 0u; quad < half_quads; quad++) { score += shares[i * stride + quad][head]; }
      let at = tile * tile_size + i;
      score = select(NEVER, score * params.scale, at >= seen_from && at <= pos);
      weights[i][head] = score;
      most = max(most, score);
    }
    let new_max = max(running_max, max_over_lanes(lane, most));
    let correction = exp(running_max - new_max);
    running_max = new_max;
    sum *= correction;
    if (lane < 4u) { corrections[lane] = correction; }
    for (var i = lane / 4u; i < tile_size; i += lanes / 4u) {
      let weight = exp(weights[i][head] - new_max);  // NEVER becomes 0
      weights[i][head] = weight;
      sum += weight;
    }
    workgroupBarrier();
    if (l.group < n_groups) {
      let c = corrections;
      mixed = Heads(times(mixed.a, c.x), times(mixed.b, c.y), times(mixed.c, c.z), times(mixed.d, c.w));
      mixed = add_all(mixed, weights[l.group], scaled(values.a, l.quad, value_bits));
      mixed = add_all(mixed, weights[l.group + n_groups], scaled(values.b, l.quad, value_bits));
      mixed = add_all(mixed, weights[l.group + 2u * n_groups], scaled(values.c, l.quad, value_bits));
      mixed = add_all(mixed, weights[l.group + 3u * n_groups], scaled(values.d, l.quad, value_bits));
    }
    if (next < end_tile) { values = value_rows(l, next); }
  }

  // The groups' shares, two heads at a time. From here on the first 8 half_quads lanes each have a quad of a head.
  let of_quad = 2u * half_quads;  // quads of a head
  let h = lane / of_quad;
  let c = lane % of_quad;
  var v = vec4<f32>(0.0);
  of_lane[lane] = sum;
  shares[lane] = mixed.a.lo;
  shares[lanes + lane] = mixed.a.hi;
  if (heads > 1u) {
    shares[2u * lanes + lane] = mixed.b.lo;
    shares[3u * lanes + lane] = mixed.b.hi;
  }
  workgroupBarrier();
  if (lane < PARTS) {
    var total = 0.0;
    for (var i = lane; i < lanes; i += PARTS) { total += of_lane[i]; }
    of_part[lane] = total;
  }
  if (h < min(heads, 2u)) {
    let begin = (2u * h + c / half_quads) * lanes + c % half_quads;
    for (var i = 0u; i < n_groups; i++) { v += shares[begin + i * half_quads]; }
  }
  workgroupBarrier();
  if (heads > 2u) {
    shares[lane] = mixed.c.lo;
    shares[lanes + lane] = mixed.c.hi;
    if (heads > 3u) {
      shares[2u * lanes + lane] = mixed.d.lo;
      shares[3u * lanes + lane] = mixed.d.hi;
    }
    workgroupBarrier();
    if (h >= 2u && h < heads) {
      let begin = (2u * (h - 2u) + c / half_quads) * lanes + c % half_quads;
      for (var i = 0u; i < n_groups; i++) { v += shares[begin + i * half_quads]; }
    }
  }
  let n_blocks = params.n_heads * params.head_dim / 32u;
  let place = select(0xFFFFFFFFu, (first_head + h) * of_quad + c, h < n_heads);
  if (finish && n_used == 1u) {
    quantize4(v / total_of(h % 4u), lane, token, place, n_blocks);
    return;
  }

  let slot = 8u * half_quads + 2u;  // of a split
  let first = (token * params.n_heads + first_head) * n_splits * slot;
  if (h < n_heads) {
    let out = first + (h * n_splits + split) * slot;
    for (var k = 0u; k < 4u; k++) { store_partial(out + element(c, k), v[k]); }
  }
  if (lane < n_heads) {
    let out = first + (lane * n_splits + split) * slot;
    store_partial(out + slot - 2u, running_max);
    store_partial(out + slot - 1u, total_of(lane));
  }
  if (finish && last_to_arrive(lane, token * n_workgroups.y + group.y, n_used)) {
    // Each split's factor, and its sum times that, of all heads; in `shares` behind a vector for each lane.
    for (var i = lane; i < 4u * n_used; i += lanes) {
      if (i % 4u < n_heads) {
        let at = first + (i % 4u * n_splits + i / 4u + 1u) * slot;
        shares[lanes + i / 4u][i % 4u] = load_partial(at - 2u);
        shares[lanes + n_splits + i / 4u][i % 4u] = load_partial(at - 1u);
      }
    }
    workgroupBarrier();
    var largest = vec4<f32>(NEVER);
    for (var s = 0u; s < n_used; s++) { largest = max(largest, shares[lanes + s]); }
    workgroupBarrier();
    for (var s = lane; s < n_used; s += lanes) {
      let factor = exp(shares[lanes + s] - largest);
      shares[lanes + s] = factor;
      shares[lanes + n_splits + s] *= factor;
    }
    workgroupBarrier();
    // So many lanes share a quad as there are for it, every `ways`-th split each.
    let n_quads = heads * of_quad;
    let ways = lanes / n_quads;
    let my_head = lane % n_quads / of_quad;
    v = vec4<f32>(0.0);
    if (lane < ways * n_quads && my_head < n_heads) {
      let begin = first + my_head * n_splits * slot;
      let my_quad = lane % of_quad;
      for (var s = lane / n_quads; s < n_used; s += 4u * ways) {
        let others = min(vec3<u32>(s) + vec3<u32>(1u, 2u, 3u) * ways, vec3<u32>(n_used - 1u));
        let there = vec3<u32>(s) + vec3<u32>(1u, 2u, 3u) * ways < vec3<u32>(n_used);
        let p0 = partial_quad(begin + s * slot, my_quad);
        let p1 = partial_quad(begin + others.x * slot, my_quad);
        let p2 = partial_quad(begin + others.y * slot, my_quad);
        let p3 = partial_quad(begin + others.z * slot, my_quad);
        v += shares[lanes + s][my_head] * p0;
        v += select(0.0, shares[lanes + others.x][my_head], there.x) * p1;
        v += select(0.0, shares[lanes + others.y][my_head], there.y) * p2;
        v += select(0.0, shares[lanes + others.z][my_head], there.z) * p3;
      }
    }
    shares[lane] = v;
    workgroupBarrier();
    var total = 1.0;
    if (h < n_heads) {
      v = shares[lane];
      for (var way = 1u; way < ways; way++) { v += shares[way * n_quads + lane]; }
      total = 0.0;
      for (var s = 0u; s < n_used; s++) { total += shares[lanes + n_splits + s][h]; }
    }
    quantize4(v / total, lane, token, place, n_blocks);
  }
}

fn total_of(head: u32) -> f32 {
  var total = 0.0;
  for (var i = head; i < PARTS; i += 4u) { total += of_part[i]; }
  return total;
}
