// x[t] = embed_tokens[tokens[t]]: one row of the coded matrix, decoded.
// One workgroup a token: a lane decodes every lanes-th segment of the row into workgroup memory, and then turns every lanes-th quad
// of columns into f32. Dispatch: (1, tokens). A token outside rows [row_begin, row_begin + rows) belongs to another part of the
// matrix and is left alone.

//#import state
//#import funnel
//#import ans
//#import words
//#import stream
//#import matrix
//#import table

override lanes: u32;
override high_groups: u32;  // of 16 columns, in whole blocks
override low_groups: u32;   // as many, or 1 where `low` is nothing

struct Params {
  row_begin: u32,
  rows: u32,
  rows_padded: u32,
  cols: u32,
  n_segments: u32,
  n_blocks: u32,
  offset: i32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> state: State;
@group(0) @binding(3) var<storage, read> row_info: array<Row>;  // of all rows, in the matrix's order; place is where they lie here
@group(0) @binding(4) var<storage, read> entries: array<u32>;  // (n_segments, rows_padded)
@group(0) @binding(5) var<storage, read> table: array<vec4<u32>>;
@group(0) @binding(6) var<storage, read> outliers: array<u32>;
@group(0) @binding(7) var<storage, read_write> x: array<f32>;  // (tokens, cols)

var<workgroup> high: array<vec4<u32>, high_groups>;  // of the row's Weights
var<workgroup> low: array<vec4<u32>, low_groups>;

fn open_segment(row: Row, index: u32, segment: u32) -> Stream {
  let entry = entries[min(segment, params.n_segments - 1u) * params.rows_padded + index];
  return open_stream(row.bit, entry / n_states, entry & (n_states - 1u), 0u);
}

fn decode_segment(s: ptr<function, Stream>, raw: u32, segment: u32) {
  let end = 2u * first_block(segment + 1u);
  for (var group = 2u * first_block(segment); group < end; group++) {
    let w = decode16(s, raw);
    high[group] = w.high;
    if (high_shift() > 0u) { low[group] = w.low; }
  }
}

// Four columns in units of the row's scale, outliers apart.
fn quad_at(quad: u32, raw: u32) -> vec4<f32> {
  var w = vec4<i32>(unpack4xU8(high[quad / 4u][quad % 4u]));
  if (high_shift() > 0u) { w = (w << vec4<u32>(high_shift())) + vec4<i32>(unpack4xU8(low[quad / 4u][quad % 4u])); }
  return vec4<f32>(w + (params.offset >> (raw_bits - raw)));
}

@compute @workgroup_size(lanes)
fn main(@builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) group: vec3<u32>) {
  let row = row_info[state.tokens[group.y]];
  let index = matrix_row(row) - params.row_begin;  // wraps far past rows below row_begin
  if (index >= params.rows) { return; }
  var s = open_segment(row, index, lane);  // on its way before the table
  load_table(lane, lanes, first_entry(row));
  for (var segment = lane; segment < params.n_segments; segment += lanes) {
    if (segment >= lanes) { s = open_segment(row, index, segment); }
    if (is_narrow(row)) {
      decode_segment(&s, narrow_raw_bits, segment);
    } else {
      decode_segment(&s, raw_bits, segment);
    }
  }
  workgroupBarrier();
  let raw = row_raw_bits(row);
  let end_k = end_outlier(row);
  for (var quad = lane; quad < (params.cols + 3u) / 4u; quad += lanes) {
    var v = quad_at(quad, raw);
    for (var k = row.first_outlier; k < end_k; k++) {
      let outlier = outliers[k];
      let column = outlier_column(outlier);
      let is_here = vec4<u32>(column) == vec4<u32>(4u * quad) + vec4<u32>(0u, 1u, 2u, 3u);
      v += select(vec4<f32>(0.0), vec4<f32>(outlier_value(outlier, raw)), is_here);
    }
    v *= row_scale(row);
    for (var i = 0u; i < 4u; i++) {
      if (4u * quad + i < params.cols) { x[group.y * params.cols + 4u * quad + i] = v[i]; }
    }
  }
}
