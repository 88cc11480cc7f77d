// ROWS rows of W times every token, for a lane that has them all to itself: no workgroup memory, no barrier.
// Beside it stand ans.wgsl, stream.wgsl, matrix.wgsl, table_rows.wgsl, sums.wgsl and dot.wgsl; the importer provides
// fn store_y(i, value)  and  params.rows, params.y_rows.

const LANES = 8u;  // one AVX2 vector
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
    if (tokens == 1u && digits == 1u) {
      var dot = array<i32, ROWS>();  // spelled out: without it naga does not zero it again in the next round
      let at = digits_at(0u, 0u, block);
      dot16_rows(&dot, streams, raw, in_digits[at]);
      dot16_rows(&dot, streams, raw, in_digits[at + 1u]);
      for (var r = 0u; r < ROWS; r++) { (*sums)[r][0] += scaled(f32(dot[r]), 0u, block, weight_offset(raw)); }
      continue;
    }
    let a = decode16_rows(streams, raw);
    let b = decode16_rows(streams, raw);
    for (var t = 0u; t < tokens; t++) {
      var dot = array<f32, ROWS>();
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

// Four weights of each row: bytes of `high`, of `low`. The rows take turns, a look-up each: a CPU has as many of them under way.
fn decode4_rows(streams: ptr<function, array<Stream, ROWS>>, raw: u32) -> array<vec2<u32>, ROWS> {
  var half: array<Half, ROWS>;
  for (var r = 0u; r < ROWS; r++) {
    var s = (*streams)[r];
    half[r] = begin4(&s, raw);
    (*streams)[r] = s;
  }
  var w: array<vec2<u32>, ROWS>;
  for (var r = 0u; r < ROWS; r++) {
    var s = (*streams)[r];
    w[r] = end4(&s, half[r], raw);
    (*streams)[r] = s;
  }
  return w;
}

fn refill_rows(streams: ptr<function, array<Stream, ROWS>>) {
  for (var r = 0u; r < ROWS; r++) {
    var s = (*streams)[r];
    refill(&s);
    (*streams)[r] = s;
  }
}

fn decode16_rows(streams: ptr<function, array<Stream, ROWS>>, raw: u32) -> array<Weights, ROWS> {
  let a = decode4_rows(streams, raw);
  let b = decode4_rows(streams, raw);
  if (raw > 2u) { refill_rows(streams); }
  let c = decode4_rows(streams, raw);
  let d = decode4_rows(streams, raw);
  refill_rows(streams);
  var w: array<Weights, ROWS>;
  for (var r = 0u; r < ROWS; r++) {
    w[r] = Weights(vec4<u32>(a[r].x, b[r].x, c[r].x, d[r].x), vec4<u32>(a[r].y, b[r].y, c[r].y, d[r].y));
  }
  return w;
}

// Multiplied as soon as they are decoded, so that few weights wait outside of registers.
fn dot16_rows(dot: ptr<function, array<i32, ROWS>>, streams: ptr<function, array<Stream, ROWS>>, raw: u32, x: vec4<u32>) {
  dot4_rows(dot, streams, raw, x.x);
  dot4_rows(dot, streams, raw, x.y);
  if (raw > 2u) { refill_rows(streams); }
  dot4_rows(dot, streams, raw, x.z);
  dot4_rows(dot, streams, raw, x.w);
  refill_rows(streams);
}

fn dot4_rows(dot: ptr<function, array<i32, ROWS>>, streams: ptr<function, array<Stream, ROWS>>, raw: u32, x: u32) {
  let w = decode4_rows(streams, raw);
  for (var r = 0u; r < ROWS; r++) { (*dot)[r] += dot4(w[r], x); }
}
