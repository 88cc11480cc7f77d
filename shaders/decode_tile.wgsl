// bytes = the weights of some rows as int8 planes (see planes.wgsl), near outliers in their places: for matmul; of all
// columns, or of those of some segments. Lanes and segments as in matvec. Dispatch: (row tiles, ceil(segments /
// segments_per_group)). Integers, exact.

//#import funnel
//#import ans
//#import words
//#import stream
//#import matrix
//#import table
//#import planes
//#import bytes

override segments_per_group: u32;
override lanes: u32;  // 32 * segments_per_group

struct Params {
  first_row: u32,  // of the part's rows, in tiles of 32
  rows_padded: u32,
  n_blocks: u32,
  n_segments: u32,
  segment_begin: u32,  // these are decoded
  segment_end: u32,
  block_begin: u32,    // where the first of them begins
  min_symbol: i32,
  max_symbol: i32,
  byte_rows: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> row_info: array<Row>;
@group(0) @binding(3) var<storage, read> entries: array<u32>;  // (n_segments, rows_padded)
@group(0) @binding(4) var<storage, read> table: array<vec4<u32>>;
@group(0) @binding(5) var<storage, read> outliers: array<u32>;
@group(0) @binding(6) var<storage, read_write> bytes: array<vec4<u32>>;  // (blocks, planes, 2, byte_rows)

@compute @workgroup_size(32, segments_per_group)
fn main(@builtin(local_invocation_id) local: vec3<u32>, @builtin(local_invocation_index) lane: u32,
        @builtin(workgroup_id) group: vec3<u32>) {
  let byte_row = group.x * 32u + local.x;
  let index = params.first_row + byte_row;
  let row = row_info[index];
  let segment = params.segment_begin + group.y * segments_per_group + local.y;  // may be past the last: of no columns
  let entry = entries[min(segment, params.segment_end - 1u) * params.rows_padded + index];
  // The stream is on its way before the table, which all must wait for.
  var s = open_stream(row.bit, entry / n_states, entry & (n_states - 1u), 0u);
  load_table(lane, lanes, first_entry(row_info[params.first_row + group.x * 32u]));
  let begin = 32u * first_block(min(segment, params.segment_end));
  let end = 32u * first_block(min(segment + 1u, params.segment_end));
  write_bytes(&s, row, begin, end, byte_row);
  add_near_outliers(row, begin, end, byte_row);
}
