// ROWS rows of W times every token, for a lane that has them all to itself: no workgroup memory, no barrier.
// Beside it stand ans.wgsl, stream.wgsl, matrix.wgsl, table_rows.wgsl, sums.wgsl and dot.wgsl; the importer provides
// fn store_y(i, value)  and  params.rows, params.y_rows.

const LANES = 8u;  // one AVX2 vector; the rows that interleave
const ROWS = 4u;   // of a lane: the activations are loaded once for all of them

// Rows first, first + LANES, ... times a factor.
fn rows_product(first: u32, factor: f32) {
  var streams: array<Stream, ROWS>;
  var sums: array<Sums, ROWS>;
  for (var r = 0u; r < ROWS; r++) {
    let index = first + r * LANES;
    let row = row_info[index];
    streams[r] = open_stream(row.bit, 0u, entries[index], first_entry(row));
  }
  if (is_narrow(row_info[first])) {
    add_blocks(&sums, &streams, narrow_raw_bits);
  } else {
    add_blocks(&sums, &streams, raw_bits);
  }
  for (var r = 0u; r < ROWS; r++) {
    let index = first + r * LANES;
    let row = row_info[index];
    var total = sums[r];
    let end = end_outlier(row);
    for (var k = row.first_outlier; k < end; k++) {
      let outlier = outliers[k];
      for (var t = 0u; t < tokens; t++) {
        total[t] += outlier_value(outlier, row_raw_bits(row)) * activation(t, outlier_column(outlier));
      }
    }
    if (index < params.rows) {
      for (var t = 0u; t < tokens; t++) {
        store_y(t * params.y_rows + matrix_row(row), total[t] * row_scale(row) * factor);
      }
    }
  }
}

fn add_blocks(sums: ptr<function, array<Sums, ROWS>>, streams: ptr<function, array<Stream, ROWS>>, raw: u32) {
  for (var block = 0u; block < params.n_blocks; block++) {
    var a: array<Weights, ROWS>;
    var b: array<Weights, ROWS>;
    for (var r = 0u; r < ROWS; r++) {
      var s = (*streams)[r];
      a[r] = decode16(&s, raw);
      b[r] = decode16(&s, raw);
      (*streams)[r] = s;
    }
    for (var t = 0u; t < tokens; t++) {
      var dot = array<f32, ROWS>();  // spelled out: without it naga does not zero it again in the next round
      for (var digit = digits; digit > 0u; digit--) {
        let at = digits_at(t, digit - 1u, block);
        let x0 = in_digits[at];
        let x1 = in_digits[at + 1u];
        for (var r = 0u; r < ROWS; r++) { dot[r] = dot[r] * DIGIT + f32(dot16(a[r], x0) + dot16(b[r], x1)); }
      }
      for (var r = 0u; r < ROWS; r++) { (*sums)[r][t] += scaled(dot[r], t, block, weight_offset(raw)); }
    }
  }
}
