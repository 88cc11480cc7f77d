// Dot products of f32 weights with f32 activations.
// The importer provides  x: array<vec4<f32>>  (tokens, 32-column blocks) and  params.n_blocks.

// Decode 32 columns of a lane's rows once, use them for every token.
fn accumulate_block(streams: ptr<function, array<Stream, MAX_ROWS>>, chunks: vec4<u32>, block: u32,
                    sums: ptr<function, array<Sums, MAX_ROWS>>) {
  for (var group = 2u * block; group < 2u * block + 2u; group++) {
    var w: array<Floats, MAX_ROWS>;
    for (var r = 0u; r < rows_per_lane; r++) {
      var s = (*streams)[r];
      w[r] = decode_floats(&s, chunks[r], group);
      (*streams)[r] = s;
    }
    for (var t = 0u; t < tokens; t++) {
      let at = t * 8u * params.n_blocks + 4u * group;
      for (var r = 0u; r < rows_per_lane; r++) {
        (*sums)[r][t] += dot(w[r].a, x[at]) + dot(w[r].b, x[at + 1u]) + dot(w[r].c, x[at + 2u]) + dot(w[r].d, x[at + 3u]);
      }
    }
  }
}

fn add_outliers(row: Row, chunk: u32, sums: Sums) -> Sums {
  var total = sums;
  let end = end_outlier(row);
  for (var k = row.first_outlier; k < end; k++) {
    let outlier = outliers[k];
    let column = outlier_column(outlier);
    let w = outlier_floats(chunk, outlier);
    for (var t = 0u; t < tokens; t++) {
      let value = x[t * 8u * params.n_blocks + (column >> 2u)][column & 3u];
      total[t] += w.y * value - w.x * value;
    }
  }
  return total;
}
