// bytes = the weights of some rows as int8 planes (see planes.wgsl), near outliers in their places: what matmul reads.
// Lanes, segments and splits as in matvec. Dispatch: (row tiles, splits). Integers, exact.

//#import funnel
//#import ans
//#import stream
//#import matrix
//#import planes

override segments_per_group: u32;
override lanes: u32;  // 32 * segments_per_group

struct Params {
  first_row: u32,  // of the part's rows, in tiles of 32
  rows_padded: u32,
  n_blocks: u32,
  n_segments: u32,
  segment_blocks: u32,
  min_symbol: i32,
  max_symbol: i32,
  byte_rows: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> words: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> row_info: array<Row>;
@group(0) @binding(3) var<storage, read> entries: array<u32>;  // (n_segments, rows_padded)
@group(0) @binding(4) var<storage, read> table: array<vec4<u32>>;
@group(0) @binding(5) var<storage, read> outliers: array<u32>;
@group(0) @binding(6) var<storage, read_write> bytes: array<vec4<u32>>;  // (n_blocks, planes, 2, byte_rows)

var<workgroup> states: array<u32, n_states>;

fn table_entry(s: ptr<function, Stream>) -> u32 { return states[(*s).state]; }

fn add_bytes(a: vec4<u32>, b: u32) -> vec4<u32> {  // each byte by itself
  let low = vec4<u32>(0x7F7F7F7Fu);
  return ((a & low) + vec4<u32>(b & 0x7F7F7F7Fu)) ^ ((a ^ vec4<u32>(b)) & ~low);
}

fn place_of(column: u32, row: u32) -> u32 {  // of the high plane
  return ((column >> 5u) * planes * 2u + ((column >> 4u) & 1u)) * params.byte_rows + row;
}

@compute @workgroup_size(32, segments_per_group)
fn main(@builtin(local_invocation_id) local: vec3<u32>, @builtin(local_invocation_index) lane: u32,
        @builtin(workgroup_id) group: vec3<u32>) {
  let byte_row = group.x * 32u + local.x;
  let index = params.first_row + byte_row;
  let row = row_info[index];
  let first = first_entry(row_info[params.first_row + group.x * 32u]);
  for (var i = lane; i < n_states / 4u; i += lanes) {
    let four = table[first / 4u + i];
    states[4u * i] = four.x;
    states[4u * i + 1u] = four.y;
    states[4u * i + 2u] = four.z;
    states[4u * i + 3u] = four.w;
  }
  workgroupBarrier();
  let segment = group.y * segments_per_group + local.y;
  if (segment >= params.n_segments) { return; }
  let entry = entries[segment * params.rows_padded + index];
  var s = open_stream(row.bit, entry / n_states, entry & (n_states - 1u), 0u);
  let begin = 32u * segment * params.segment_blocks;
  let end = min(begin + 32u * params.segment_blocks, 32u * params.n_blocks);
  let offset = (u32(params.min_symbol << symbol_shift()) & 255u) * 0x01010101u;
  for (var column = begin; column < end; column += 16u) {
    let w = decode16(&s);
    let at = place_of(column, byte_row);
    bytes[at] = add_bytes(w.high, offset);
    if (planes == 2u) { bytes[at + 2u * params.byte_rows] = w.low; }
  }

  // Outliers of a row are in the order of their columns: find the segment's first.
  let end_k = end_outlier(row);
  var k = row.first_outlier;
  for (var after = end_k; k < after;) {
    let middle = (k + after) / 2u;
    if (outlier_column(outliers[middle]) < begin) { k = middle + 1u; } else { after = middle; }
  }
  for (; k < end_k; k++) {
    let outlier = outliers[k];
    let column = outlier_column(outlier);
    if (column >= end) { break; }
    if (!is_far(outlier)) {
      let at = place_of(column, byte_row);
      let quad = (column >> 2u) & 3u;
      let added = u32(remainder(outlier) << symbol_shift()) & 255u;
      var four = bytes[at];
      four[quad] = add_bytes(four, added << (8u * (column & 3u)))[quad];
      bytes[at] = four;
    }
  }
}
