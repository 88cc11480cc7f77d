// y[split, t, row] = scale[row] * sum over the split's columns of W[row, column] x[t, column], W decoded by decode_tile: many
// tokens at once. The consumer of y adds the splits up. Where only some columns are decoded, the first ones' sum is
// written and the others' are added to it.
// A workgroup multiplies a tile of rows with a tile of tokens, block by block of 32 columns: the next block is on its way
// while one is multiplied. A lane has 4 * row_groups rows and four tokens. int8 products, exact within a block; sums over
// blocks in f32. Dispatch: (ceil(rows / (1024 / token_lanes * row_groups)), ceil(tokens / (4 token_lanes)), splits); x and y
// have room for whole tiles of tokens.

//#import matrix
//#import planes

override n_states: u32;  // as ans.wgsl has them
override raw_bits: u32;
override token_lanes: u32;  // 16, or 8 for few tokens: each has four, and so have the LANES / token_lanes of rows
override row_groups: u32;   // 1 or 2
override row_quads: u32;    // 4 * rows of a tile: two blocks of 32 columns, in vectors of 16

struct Params {
  rows: u32,       // to be multiplied
  first_row: u32,  // their first in row_info
  y_rows: u32,
  n_blocks: u32,
  n_segments: u32,
  block_begin: u32,  // these are decoded
  block_end: u32,
  byte_rows: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> bytes: array<vec4<u32>>;     // (blocks, planes, 2, byte_rows)
@group(0) @binding(2) var<storage, read> row_info: array<Row>;
@group(0) @binding(3) var<storage, read> far_outliers: array<u32>;
@group(0) @binding(4) var<storage, read> x_digits: array<vec4<u32>>;  // (tokens, 2 n_blocks)
@group(0) @binding(5) var<storage, read> x_scale: array<vec2<f32>>;   // (tokens, n_blocks)
@group(0) @binding(6) var<storage, read_write> y: array<f32>;         // (splits, tokens, y_rows)

const LANES = 256u;

var<workgroup> w_tile: array<vec4<u32>, row_quads>;  // (2 stages, 2 halves, rows)
var<workgroup> x_tile: array<vec4<u32>, 256>;        // (2 stages, 2 halves, tokens)
var<workgroup> scales: array<f32, 128>;              // (2 stages, tokens)

struct Fetched {  // of the next block, by one lane
  first: vec4<u32>,
  second: vec4<u32>,
  scale: f32,
}

// A lane's four rows are row_lanes() apart, its four tokens token_lanes; its second group of rows comes after all first ones.
fn row_lanes() -> u32 { return LANES / token_lanes; }
fn tile_rows() -> u32 { return 4u * row_lanes() * row_groups; }
fn tile_tokens() -> u32 { return 4u * token_lanes; }

fn fetch_quad(i: u32, first: vec2<u32>, step: u32) -> vec4<u32> {  // those of the weights, then the activations'
  if (i < 2u * tile_rows()) {
    return bytes[(2u * step + i / tile_rows()) * params.byte_rows + first.x + i % tile_rows()];
  }
  let token = first.y + (i - 2u * tile_rows()) / 2u;
  return x_digits[2u * (token * params.n_blocks + params.block_begin + step / planes) + (i & 1u)];
}

fn fetch(lane: u32, first: vec2<u32>, step: u32) -> Fetched {
  var f: Fetched;
  f.first = fetch_quad(lane, first, step);
  if (lane + LANES < 2u * (tile_rows() + tile_tokens())) { f.second = fetch_quad(lane + LANES, first, step); }
  if (lane < tile_tokens()) {
    let shift = f32(1u << plane_shift(step % planes));
    f.scale = x_scale[(first.y + lane) * params.n_blocks + params.block_begin + step / planes].x * shift;
  }
  return f;
}

fn keep_quad(i: u32, value: vec4<u32>, stage: u32) {
  if (i < 2u * tile_rows()) { w_tile[stage * 2u * tile_rows() + i] = value; }
  else { x_tile[(stage * 2u + (i & 1u)) * tile_tokens() + (i - 2u * tile_rows()) / 2u] = value; }
}

fn keep(lane: u32, f: Fetched, stage: u32) {
  keep_quad(lane, f.first, stage);
  if (lane + LANES < 2u * (tile_rows() + tile_tokens())) { keep_quad(lane + LANES, f.second, stage); }
  if (lane < tile_tokens()) { scales[stage * tile_tokens() + lane] = f.scale; }
}

struct Rows {  // 32 columns of four rows
  low0: vec4<u32>,
  low1: vec4<u32>,
  low2: vec4<u32>,
  low3: vec4<u32>,
  high0: vec4<u32>,
  high1: vec4<u32>,
  high2: vec4<u32>,
  high3: vec4<u32>,
}

fn rows_at(stage: u32, row: u32) -> Rows {
  let low = stage * 2u * tile_rows() + row;
  let high = low + tile_rows();
  let n = row_lanes();
  return Rows(
    w_tile[low], w_tile[low + n], w_tile[low + 2u * n], w_tile[low + 3u * n],
    w_tile[high], w_tile[high + n], w_tile[high + 2u * n], w_tile[high + 3u * n]);
}

fn dot32(low: vec4<u32>, high: vec4<u32>, x_low: vec4<u32>, x_high: vec4<u32>) -> i32 {
  return dot4I8Packed(low.x, x_low.x) + dot4I8Packed(low.y, x_low.y)
    + dot4I8Packed(low.z, x_low.z) + dot4I8Packed(low.w, x_low.w)
    + dot4I8Packed(high.x, x_high.x) + dot4I8Packed(high.y, x_high.y)
    + dot4I8Packed(high.z, x_high.z) + dot4I8Packed(high.w, x_high.w);
}

fn product(w: Rows, stage: u32, token: u32) -> vec4<f32> {
  let x_low = x_tile[stage * 2u * tile_tokens() + token];
  let x_high = x_tile[(stage * 2u + 1u) * tile_tokens() + token];
  let dots = vec4<i32>(
    dot32(w.low0, w.high0, x_low, x_high),
    dot32(w.low1, w.high1, x_low, x_high),
    dot32(w.low2, w.high2, x_low, x_high),
    dot32(w.low3, w.high3, x_low, x_high));
  return vec4<f32>(dots) * scales[stage * tile_tokens() + token];
}

fn activation(token: u32, column: u32) -> f32 {
  let word = x_digits[token * 2u * params.n_blocks + (column >> 4u)][(column >> 2u) & 3u];
  let digit = extractBits(bitcast<i32>(word), (column & 3u) * 8u, 8u);
  return f32(digit) * x_scale[token * params.n_blocks + (column >> 5u)].x;
}

// Four tokens' sums of one row; `first_token` is where the split's tokens begin in y.
fn write_row(index: u32, token: u32, row_sums: vec4<f32>, first_token: u32) {
  if (index >= params.rows) { return; }
  let row = row_info[params.first_row + index];
  let place = matrix_row(row);
  let n = token_lanes;
  var sums = row_sums;
  if (first_token == 0u && params.block_begin == 0u) {  // the first split has the far outliers, wherever these are
    let end = far_outliers[place + 1u];
    for (var k = far_outliers[place]; k < end; k++) {
      let column = outlier_column(far_outliers[k]);
      let x = vec4<f32>(activation(token, column), activation(token + n, column),
                        activation(token + 2u * n, column), activation(token + 3u * n, column));
      sums += outlier_value(far_outliers[k], row_raw_bits(row)) * x;
    }
  }
  sums *= row_scale(row);
  let at = (first_token + token + n * vec4<u32>(0u, 1u, 2u, 3u)) * params.y_rows + place;
  if (params.block_begin > 0u) { sums += vec4<f32>(y[at.x], y[at.y], y[at.z], y[at.w]); }
  y[at.x] = sums.x;
  y[at.y] = sums.y;
  y[at.z] = sums.z;
  y[at.w] = sums.w;
}

fn write_rows(index: u32, token: u32, by_token: mat4x4<f32>, first_token: u32) {
  let by_row = transpose(by_token);
  let n = row_lanes();
  write_row(index, token, by_row[0], first_token);
  write_row(index + n, token, by_row[1], first_token);
  write_row(index + 2u * n, token, by_row[2], first_token);
  write_row(index + 3u * n, token, by_row[3], first_token);
}

@compute @workgroup_size(LANES)
fn main(@builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) group: vec3<u32>,
        @builtin(num_workgroups) groups: vec3<u32>) {
  let first = group.xy * vec2<u32>(tile_rows(), tile_tokens());
  // Eight rows by four tokens to 32 neighbouring lanes: fewest different words to load.
  let warp = lane >> 5u;
  let row_warps = row_lanes() / 8u;
  let row = (lane & 7u) + 8u * (warp % row_warps);
  let token = ((lane >> 3u) & 3u) + 4u * (warp / row_warps);
  let n = token_lanes;
  // Written out, a vector of four rows for each token: arrays that a loop indexes may not become registers.
  var a0 = vec4<f32>(0.0);
  var a1 = vec4<f32>(0.0);
  var a2 = vec4<f32>(0.0);
  var a3 = vec4<f32>(0.0);
  var b0 = vec4<f32>(0.0);
  var b1 = vec4<f32>(0.0);
  var b2 = vec4<f32>(0.0);
  var b3 = vec4<f32>(0.0);
  let blocks = params.block_end - params.block_begin;
  let begin = group.z * blocks / groups.z * planes;
  let end = (group.z + 1u) * blocks / groups.z * planes;
  keep(lane, fetch(lane, first, begin), begin & 1u);
  workgroupBarrier();
  for (var step = begin; step < end; step++) {
    let stage = step & 1u;
    let next = fetch(lane, first, min(step + 1u, end - 1u));
    let w = rows_at(stage, row);
    a0 += product(w, stage, token);
    a1 += product(w, stage, token + n);
    a2 += product(w, stage, token + 2u * n);
    a3 += product(w, stage, token + 3u * n);
    if (row_groups == 2u) {
      let w2 = rows_at(stage, row + 4u * row_lanes());
      b0 += product(w2, stage, token);
      b1 += product(w2, stage, token + n);
      b2 += product(w2, stage, token + 2u * n);
      b3 += product(w2, stage, token + 3u * n);
    }
    keep(lane, next, stage ^ 1u);
    workgroupBarrier();
  }
  let first_token = group.z * groups.y * tile_tokens();
  write_rows(first.x + row, first.y + token, mat4x4<f32>(a0, a1, a2, a3), first_token);
  if (row_groups == 2u) {
    write_rows(first.x + row + 4u * row_lanes(), first.y + token, mat4x4<f32>(b0, b1, b2, b3), first_token);
  }
}
