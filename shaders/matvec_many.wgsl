// matvec for many tokens: a lane takes a row of each of ROWS tiles, and loads their activations once for all of them, which
// is most of the work from some eight tokens on. Lane = row of a 32-row tile, workgroup row = column segment.
// Dispatch: (row tiles / ROWS, splits). Same arithmetic as matvec, in the same order: a row of a pass is what it is alone.

//#import state
//#import funnel
//#import ans
//#import stream
//#import matrix
//#import sums
//#import digits
//#import dot
//#import segments

const ROWS = 2u;

override table_states: u32;  // ROWS * n_states

struct Params {
  rows: u32,
  rows_padded: u32,
  y_rows: u32,
  n_blocks: u32,
  n_segments: u32,
  offset: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> words: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> row_info: array<Row>;
@group(0) @binding(3) var<storage, read> entries: array<u32>;  // (n_segments, rows_padded)
@group(0) @binding(4) var<storage, read> table: array<vec4<u32>>;
@group(0) @binding(5) var<storage, read> outliers: array<u32>;
@group(0) @binding(6) var<storage, read> in_digits: array<vec4<u32>>;
@group(0) @binding(7) var<storage, read> in_scale: array<vec2<f32>>;
@group(0) @binding(8) var<storage, read_write> y: array<f32>;  // (splits, tokens, y_rows)

var<workgroup> states: array<u32, table_states>;  // of each tile's class

fn table_entry(s: ptr<function, Stream>) -> u32 { return states[(*s).table + (*s).state]; }

fn load_table(lane: u32, first_entry: u32, at: u32) {
  for (var i = lane; i < n_states / 4u; i += 32u * segments_per_group) {
    let four = table[first_entry / 4u + i];
    let first = at + 4u * i;
    states[first] = four.x;
    states[first + 1u] = four.y;
    states[first + 2u] = four.z;
    states[first + 3u] = four.w;
  }
}

fn store_y(i: u32, value: f32) { y[i] = value; }

fn product_scale(row: Row) -> f32 { return row_scale(row); }

// The first row of one of the workgroup's tiles. There may be none left: then the last one is taken once more.
fn first_row(group: u32, r: u32) -> u32 { return min(32u * (ROWS * group + r), params.rows_padded - 32u); }

@compute @workgroup_size(32, segments_per_group)
fn main(@builtin(local_invocation_id) local: vec3<u32>, @builtin(local_invocation_index) lane: u32,
        @builtin(workgroup_id) group: vec3<u32>) {
  let segment = group.y * segments_per_group + local.y;
  var streams: array<Stream, ROWS>;
  for (var r = 0u; r < ROWS; r++) {
    let index = first_row(group.x, r) + local.x;
    let entry = entries[segment * params.rows_padded + index];
    streams[r] = open_stream(row_info[index].bit, entry / n_states, entry & (n_states - 1u), r * n_states);
  }
  for (var r = 0u; r < ROWS; r++) { load_table(lane, first_entry(row_info[first_row(group.x, r)]), r * n_states); }
  workgroupBarrier();

  var sums: array<Sums, ROWS>;
  let end = first_block(segment + 1u);
  for (var block = first_block(segment); block < end; block++) {
    var a: array<Weights, ROWS>;
    var b: array<Weights, ROWS>;
    for (var r = 0u; r < ROWS; r++) {
      var s = streams[r];
      a[r] = decode16(&s);
      b[r] = decode16(&s);
      streams[r] = s;
    }
    for (var t = 0u; t < tokens; t++) {
      var dot = array<f32, ROWS>();  // spelled out: without it naga does not zero it again in the next round
      for (var digit = digits; digit > 0u; digit--) {
        let at = digits_at(t, digit - 1u, block);
        let x0 = in_digits[at];
        let x1 = in_digits[at + 1u];
        for (var r = 0u; r < ROWS; r++) { dot[r] = dot[r] * DIGIT + f32(dot16(a[r], x0) + dot16(b[r], x1)); }
      }
      for (var r = 0u; r < ROWS; r++) { sums[r][t] += scaled(dot[r], t, block); }
    }
  }

  for (var r = 0u; r < ROWS; r++) {
    let index = first_row(group.x, r) + local.x;
    let row = row_info[index];
    // The row's segments share its outliers, wherever these are.
    let end_k = end_outlier(row);
    for (var k = row.first_outlier + segment; k < end_k; k += params.n_segments) {
      let outlier = outliers[k];
      for (var t = 0u; t < tokens; t++) {
        sums[r][t] += outlier_value(outlier) * activation(t, outlier_column(outlier));
      }
    }
    write_sums(sums[r], row, index, local.xy, group.y);
  }
}
