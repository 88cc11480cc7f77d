// matvec for many tokens: a lane takes a row of each of ROWS tiles, so that it loads their activations once for all of
// them, which is what limits matvec from some eight tokens on. Lane = row of a 32-row tile, workgroup row = column segment;
// with ROWS times the sums in registers, a workgroup of few lanes takes its segments in `passes`. Every sum is added up
// in matvec's order, so that a row of a pass is what it is alone. Dispatch: (row tiles / ROWS, splits).

//#import state
//#import funnel
//#import ans
//#import stream
//#import matrix
//#import sums
//#import digits
//#import dot

const ROWS = 2u;

override segments_per_group: u32;
override passes: u32;
override lane_rows: u32;     // workgroup rows: segments_per_group / passes, rounded up
override partials: u32;      // 32 * lane_rows^2
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
var<workgroup> partial: array<f32, partials>;     // (lane_rows tokens, lanes)

fn table_entry(s: ptr<function, Stream>) -> u32 { return states[(*s).table + (*s).state]; }

fn load_table(lane: u32, tile: u32, first: u32) {
  let begin = first_entry(row_info[32u * tile]) / 4u;
  for (var i = lane; i < n_states / 4u; i += 32u * lane_rows) {
    let four = table[begin + i];
    let at = first + 4u * i;
    states[at] = four.x;
    states[at + 1u] = four.y;
    states[at + 2u] = four.z;
    states[at + 3u] = four.w;
  }
}

// Of a row that lies beyond the last tile there is nothing to write: the last one is taken once more.
fn row_index(tile: u32, lane_row: u32) -> u32 { return 32u * min(tile, params.rows_padded / 32u - 1u) + lane_row; }

@compute @workgroup_size(32, lane_rows)
fn main(@builtin(local_invocation_id) local: vec3<u32>, @builtin(local_invocation_index) lane: u32,
        @builtin(workgroup_id) group: vec3<u32>) {
  var totals: array<Sums, ROWS>;  // of token lane_rows * i + local.y
  for (var p = 0u; p < passes; p++) {
    let first = p * lane_rows;
    let n = min(lane_rows, segments_per_group - first);  // segments of this pass
    let segment = group.y * segments_per_group + first + min(local.y, n - 1u);
    var streams: array<Stream, ROWS>;
    for (var r = 0u; r < ROWS; r++) {
      let index = row_index(ROWS * group.x + r, local.x);
      let entry = entries[segment * params.rows_padded + index];
      streams[r] = open_stream(row_info[index].bit, entry / n_states, entry & (n_states - 1u), r * n_states);
    }
    if (p == 0u) {
      for (var r = 0u; r < ROWS; r++) { load_table(lane, row_index(ROWS * group.x + r, 0u) / 32u, r * n_states); }
      workgroupBarrier();
    }

    var sums = array<Sums, ROWS>();  // spelled out: without it naga does not zero it again in the next pass
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
        var dot = array<f32, ROWS>();
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
      // The row's segments share its outliers, wherever these are.
      let row = row_info[row_index(ROWS * group.x + r, local.x)];
      let end_k = end_outlier(row);
      for (var k = row.first_outlier + segment; k < end_k; k += params.n_segments) {
        let outlier = outliers[k];
        for (var t = 0u; t < tokens; t++) {
          sums[r][t] += outlier_value(outlier) * activation(t, outlier_column(outlier));
        }
      }
      for (var i = 0u; i * lane_rows < tokens; i++) {
        workgroupBarrier();
        for (var j = 0u; j < lane_rows && i * lane_rows + j < tokens; j++) {
          partial[32u * lane_rows * j + lane] = sums[r][i * lane_rows + j];
        }
        workgroupBarrier();
        for (var j = 0u; j < n; j++) { totals[r][i] += partial[32u * (lane_rows * local.y + j) + local.x]; }
      }
    }
  }

  for (var r = 0u; r < ROWS; r++) {
    let index = row_index(ROWS * group.x + r, local.x);
    let row = row_info[index];
    for (var i = 0u; i * lane_rows < tokens; i++) {
      let t = i * lane_rows + local.y;
      if (t < tokens && index < params.rows) {
        y[(group.y * tokens + t) * params.y_rows + matrix_row(row)] = totals[r][i] * row_scale(row);
      }
    }
  }
}
