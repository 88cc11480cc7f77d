// bytes = the weights of some rows as int8 planes (see planes.wgsl), near outliers in their places: for matmul_rows.
// decode_tile for software adapters: a lane decodes whole rows, with the table in uniform memory as in matvec_rows.
// Dispatch: ceil(rows / LANES). Integers, exact.

//#import funnel
//#import ans
//#import words
//#import stream
//#import matrix
//#import table_rows
//#import planes
//#import bytes

const LANES = 8u;  // one AVX2 vector

struct Params {
  first_row: u32,  // of the part's rows
  n_blocks: u32,
  n_segments: u32,
  block_begin: u32,  // 0
  min_symbol: i32,
  max_symbol: i32,
  byte_rows: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<uniform> table: array<vec4<u32>, 4096>;  // of all classes, and a rest never reached
@group(0) @binding(3) var<storage, read> row_info: array<Row>;
@group(0) @binding(4) var<storage, read> entries: array<u32>;  // the rows' initial states
@group(0) @binding(5) var<storage, read> outliers: array<u32>;
@group(0) @binding(6) var<storage, read_write> bytes: array<vec4<u32>>;  // (n_blocks, planes, 2, byte_rows)

@compute @workgroup_size(LANES)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
  let index = params.first_row + id.x;
  let row = row_info[index];
  var s = open_stream(row.bit, 0u, entries[index], first_entry(row));
  write_bytes(&s, row, 0u, 32u * params.n_blocks, id.x);
  add_near_outliers(row, 0u, 32u * params.n_blocks, id.x);
}
