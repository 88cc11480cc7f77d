// Weights of whole rows to bytes: see planes.wgsl, which stands beside it with ans.wgsl, stream.wgsl and matrix.wgsl.
// The importer provides  outliers: array<u32>,  bytes: array<vec4<u32>>  (blocks, planes, 2, byte_rows), the first of which
// is params.block_begin,  and params.byte_rows, params.min_symbol, params.max_symbol.

fn add_bytes(a: vec4<u32>, b: u32) -> vec4<u32> {  // each byte by itself
  let low = vec4<u32>(0x7F7F7F7Fu);
  return ((a & low) + vec4<u32>(b & 0x7F7F7F7Fu)) ^ ((a ^ vec4<u32>(b)) & ~low);
}

fn place_of(column: u32, byte_row: u32) -> u32 {  // of the first plane
  return (((column >> 5u) - params.block_begin) * planes * 2u + ((column >> 4u) & 1u)) * params.byte_rows + byte_row;
}

// Columns begin .. end - 1, whole blocks of them, from a stream that has come there.
fn write_bytes(s: ptr<function, Stream>, row: Row, begin: u32, end: u32, byte_row: u32) {
  if (is_narrow(row)) {
    write_bytes_of(s, narrow_raw_bits, begin, end, byte_row);
  } else {
    write_bytes_of(s, raw_bits, begin, end, byte_row);
  }
}

fn write_bytes_of(s: ptr<function, Stream>, raw: u32, begin: u32, end: u32, byte_row: u32) {
  let offset = (u32(params.min_symbol << symbol_shift(raw)) & 255u) * 0x01010101u;
  for (var column = begin; column < end; column += 16u) {
    let w = decode16(s, raw);
    let at = place_of(column, byte_row);
    bytes[at] = add_bytes(w.high, offset);
    if (planes == 2u) { bytes[at + 2u * params.byte_rows] = w.low; }
  }
}

fn is_near(remainder: i32, shift: u32) -> bool {
  let room = 128 >> shift;
  return params.min_symbol + remainder >= -room && params.max_symbol + remainder < room;
}

// The near outliers of those columns, once their bytes are written. A row's outliers are in the order of their columns.
fn add_near_outliers(row: Row, begin: u32, end: u32, byte_row: u32) {
  let end_k = end_outlier(row);
  let shift = symbol_shift(row_raw_bits(row));
  var k = row.first_outlier;
  for (var after = end_k; k < after;) {
    let middle = (k + after) / 2u;
    if (outlier_column(outliers[middle]) < begin) { k = middle + 1u; } else { after = middle; }
  }
  for (; k < end_k; k++) {
    let column = outlier_column(outliers[k]);
    if (column >= end) { break; }
    let remainder = bitcast<i32>(outliers[k]) >> 16u;
    if (is_near(remainder, shift)) {
      let at = place_of(column, byte_row);
      let quad = (column >> 2u) & 3u;
      let added = u32(remainder << shift) & 255u;
      var four = bytes[at];
      four[quad] = add_bytes(four, added << (8u * (column & 3u)))[quad];
      bytes[at] = four;
    }
  }
}
