// matvec for many tokens: a lane takes a row of each of ROWS tiles, so that it loads their activations once for all these
// rows; that is what limits matvec from some eight tokens on. Lane = row of a 32-row tile, workgroup row = as many column
// segments as are `joined`. Dispatch: (row tiles / ROWS, splits). Same arithmetic as matvec.

//#import state
//#import funnel
//#import ans
//#import stream
//#import matrix
//#import sums
//#import digits
//#import dot

const ROWS = 2u;

override segments_per_group: u32;  // lanes that share a row
override lanes: u32;               // 32 * segments_per_group
override words_of_rows: u32;       // ROWS * n_states

struct Params {
  rows: u32,
  rows_padded: u32,
  y_rows: u32,
  n_blocks: u32,
  n_segments: u32,
  joined: u32,
  splits: u32,
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

// The tables of the tiles' classes; in the end, when these have served, the lanes' sums.
var<workgroup> states: array<u32, words_of_rows>;

fn table_entry(s: ptr<function, Stream>) -> u32 { return states[(*s).table + (*s).state]; }

fn load_table(lane: u32, tile: u32, first: u32) {
  let begin = first_entry(row_info[32u * tile]) / 4u;
  for (var i = lane; i < n_states / 4u; i += lanes) {
    let four = table[begin + i];
    let at = first + 4u * i;
    states[at] = four.x;
    states[at + 1u] = four.y;
    states[at + 2u] = four.z;
    states[at + 3u] = four.w;
  }
}

@compute @workgroup_size(32, segments_per_group)
fn main(@builtin(local_invocation_id) local: vec3<u32>, @builtin(local_invocation_index) lane: u32,
        @builtin(workgroup_id) group: vec3<u32>) {
  let last_tile = params.rows_padded / 32u - 1u;
  let segment = group.y * segments_per_group + local.y;
  let begin = first_block(segment * params.joined);
  let end = first_block((segment + 1u) * params.joined);
  var streams: array<Stream, ROWS>;
  for (var r = 0u; r < ROWS; r++) {
    let tile = min(ROWS * group.x + r, last_tile);  // what is beyond is the last one once more
    let index = 32u * tile + local.x;
    let entry = entries[segment * params.joined * params.rows_padded + index];
    streams[r] = open_stream(row_info[index].bit, entry / n_states, entry & (n_states - 1u), r * n_states);
    load_table(lane, tile, r * n_states);
  }
  workgroupBarrier();

  var sums: array<Sums, ROWS>;
  for (var block = begin; block < end; block++) {
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
    let index = 32u * min(ROWS * group.x + r, last_tile) + local.x;
    let row = row_info[index];
    // The row's lanes share its outliers, wherever these are.
    let end_k = end_outlier(row);
    for (var k = row.first_outlier + segment; k < end_k; k += segments_per_group * params.splits) {
      let outlier = outliers[k];
      for (var t = 0u; t < tokens; t++) {
        sums[r][t] += outlier_value(outlier) * activation(t, outlier_column(outlier));
      }
    }
    // Of as many tokens at a time as there is room for.
    let room = words_of_rows / lanes;
    for (var first = 0u; first < tokens; first += room) {
      workgroupBarrier();
      for (var t = 0u; t < tokens; t++) {  // not from `first` on: sums are in registers, their indices constants
        if (t >= first && t < first + room) { states[(t - first) * lanes + lane] = bitcast<u32>(sums[r][t]); }
      }
      workgroupBarrier();
      let most = min(first + room, tokens);
      for (var t = first + local.y; t < most; t += segments_per_group) {
        var sum = 0.0;
        for (var i = 0u; i < segments_per_group; i++) {
          sum += bitcast<f32>(states[(t - first) * lanes + 32u * i + local.x]);
        }
        if (index < params.rows) {
          y[(group.y * tokens + t) * params.y_rows + matrix_row(row)] = sum * row_scale(row);
        }
      }
    }
  }
}
