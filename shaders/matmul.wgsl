// y[t, row] = scale[row] * sum of W[row, column] x[t, column], W decoded by decode_tile: many tokens at once.
// A workgroup of 256 lanes multiplies `tile` rows with `tile` tokens, block by block of 32 columns: the next block is on
// its way while one is multiplied, each lane per_lane rows by per_lane tokens. int8 products, exact within a block;
// sums over blocks in f32. Dispatch: (ceil(rows / tile), ceil(tokens / tile)); x and y have room for whole tiles of tokens.

//#import matrix
//#import planes

override n_states: u32;  // as ans.wgsl has them
override raw_bits: u32;

override per_lane: u32;    // 4 or 8
override tile: u32;        // 16 * per_lane
override tile_quads: u32;  // 4 * tile: two blocks of 32 columns, in vectors of 16

struct Params {
  rows: u32,       // to be multiplied
  first_row: u32,  // their first in row_info
  y_rows: u32,
  n_blocks: u32,
  byte_rows: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> bytes: array<vec4<u32>>;     // (n_blocks, planes, 2, byte_rows)
@group(0) @binding(2) var<storage, read> row_info: array<Row>;
@group(0) @binding(3) var<storage, read> far_outliers: array<u32>;
@group(0) @binding(4) var<storage, read> x_digits: array<vec4<u32>>;  // (tokens, 2 n_blocks)
@group(0) @binding(5) var<storage, read> x_scale: array<vec2<f32>>;   // (tokens, n_blocks)
@group(0) @binding(6) var<storage, read_write> y: array<f32>;         // (tokens, y_rows)

const LANES = 256u;
const MAX_PER_LANE = 8u;

var<workgroup> w_tile: array<vec4<u32>, tile_quads>;  // (2 stages, 2 halves, tile)
var<workgroup> x_tile: array<vec4<u32>, tile_quads>;
var<workgroup> scale_tile: array<f32, tile_quads>;    // (2 stages, tile)

struct Fetched {  // of the next block, by one lane
  a: vec4<u32>,
  b: vec4<u32>,
  scale: f32,
}

fn fetch_quad(i: u32, first: vec2<u32>, step: u32) -> vec4<u32> {  // 2 * tile of weights, then as many of activations
  if (i < 2u * tile) {
    return bytes[(2u * step + i / tile) * params.byte_rows + first.x + i % tile];
  }
  let token = first.y + (i - 2u * tile) / 2u;
  return x_digits[token * 2u * params.n_blocks + 2u * (step / planes) + (i & 1u)];
}

fn fetch(lane: u32, first: vec2<u32>, step: u32) -> Fetched {
  var f: Fetched;
  f.a = fetch_quad(lane, first, step);
  if (per_lane == 8u) { f.b = fetch_quad(lane + LANES, first, step); }
  if (lane < tile) {
    let shift = f32(1u << plane_shift(step % planes));
    f.scale = x_scale[(first.y + lane) * params.n_blocks + step / planes].x * shift;
  }
  return f;
}

fn keep_quad(i: u32, value: vec4<u32>, stage: u32) {
  if (i < 2u * tile) { w_tile[stage * 2u * tile + i] = value; }
  else { x_tile[(stage * 2u + (i & 1u)) * tile + (i - 2u * tile) / 2u] = value; }
}

fn keep(lane: u32, f: Fetched, stage: u32) {
  keep_quad(lane, f.a, stage);
  if (per_lane == 8u) { keep_quad(lane + LANES, f.b, stage); }
  if (lane < tile) { scale_tile[stage * tile + lane] = f.scale; }
}

fn dot_bytes(w: vec4<u32>, x: vec4<u32>) -> i32 {
  return dot4I8Packed(w.x, x.x) + dot4I8Packed(w.y, x.y) + dot4I8Packed(w.z, x.z) + dot4I8Packed(w.w, x.w);
}

fn activation(token: u32, column: u32) -> f32 {
  let quad = x_digits[token * 2u * params.n_blocks + (column >> 4u)][(column >> 2u) & 3u];
  let digit = extractBits(bitcast<i32>(quad), (column & 3u) * 8u, 8u);
  return f32(digit) * x_scale[token * params.n_blocks + (column >> 5u)].x;
}

@compute @workgroup_size(LANES)
fn main(@builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) group: vec3<u32>) {
  let first = group.xy * tile;
  // Eight rows by four tokens to 32 neighbouring lanes: both loads are then one pass through the banks.
  let my_row = (lane & 7u) | ((lane >> 2u) & 8u);
  let my_token = ((lane >> 3u) & 3u) | ((lane >> 4u) & 12u);
  var sums: array<array<f32, MAX_PER_LANE>, MAX_PER_LANE>;  // by token, by row
  let n_steps = params.n_blocks * planes;
  keep(lane, fetch(lane, first, 0u), 0u);
  workgroupBarrier();
  for (var step = 0u; step < n_steps; step++) {
    let stage = step & 1u;
    let next = fetch(lane, first, min(step + 1u, n_steps - 1u));
    var low: array<vec4<u32>, MAX_PER_LANE>;
    var high: array<vec4<u32>, MAX_PER_LANE>;
    for (var r = 0u; r < per_lane; r++) {
      low[r] = w_tile[stage * 2u * tile + my_row + 16u * r];
      high[r] = w_tile[(stage * 2u + 1u) * tile + my_row + 16u * r];
    }
    for (var t = 0u; t < per_lane; t++) {
      let x_low = x_tile[stage * 2u * tile + my_token + 16u * t];
      let x_high = x_tile[(stage * 2u + 1u) * tile + my_token + 16u * t];
      let scale = scale_tile[stage * tile + my_token + 16u * t];
      for (var r = 0u; r < per_lane; r++) {
        sums[t][r] += f32(dot_bytes(low[r], x_low) + dot_bytes(high[r], x_high)) * scale;
      }
    }
    keep(lane, next, stage ^ 1u);
    workgroupBarrier();
  }

  for (var r = 0u; r < per_lane; r++) {
    let index = first.x + my_row + 16u * r;
    if (index < params.rows) {
      let row = row_info[params.first_row + index];
      let place = matrix_row(row);
      let end = far_outliers[place + 1u];
      for (var k = far_outliers[place]; k < end; k++) {
        let outlier = far_outliers[k];
        for (var t = 0u; t < per_lane; t++) {
          sums[t][r] += outlier_value(outlier) * activation(first.y + my_token + 16u * t, outlier_column(outlier));
        }
      }
      for (var t = 0u; t < per_lane; t++) {
        y[(first.y + my_token + 16u * t) * params.y_rows + place] = sums[t][r] * row_scale(row);
      }
    }
  }
}
