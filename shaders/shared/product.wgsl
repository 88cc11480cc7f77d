// A workgroup's share of W x: lane = row of a 32-row tile, workgroup row = column segment.
// Beside it stand ans.wgsl, stream.wgsl, matrix.wgsl, table.wgsl, sums.wgsl, dot.wgsl, segments.wgsl, outliers.wgsl; and
// input.wgsl, or input_made.wgsl with what tells it of what.

// The row's segment times every token, the row's scale apart; `tile` and `split` are the workgroup's, `local` the lane's (row of
// the tile, segment of the workgroup).
fn segment_product(tile: u32, split: u32, local: vec2<u32>, row: Row) -> Sums {
  let lane = 32u * local.y + local.x;
  let segment = split * segments_per_group + local.y;
  let entry = entries[segment * params.rows_padded + tile * 32u + local.x];
  let v = begin_input(split, lane);
  // The stream is on its way before the table, which all must wait for.
  var s = open_stream(row.bit, entry / n_states, entry & (n_states - 1u), 0u);
  let own = begin_outliers(tile, lane);
  load_table(lane, 32u * segments_per_group, first_entry(row_info[tile * 32u]));
  end_input(v, lane);
  end_outliers(own, tile, split, lane);
  var sums = Sums();
  if (is_narrow(row)) {
    add_blocks(&sums, &s, segment, narrow_raw_bits);
  } else {
    add_blocks(&sums, &s, segment, raw_bits);
  }
  // The row's segments share its outliers, wherever these are; or those of the workgroup, if it knows no other input.
  let n_sharing = select(params.n_segments, segments_per_group, INPUT_OF_SPLIT);
  let place = select(segment, local.y, INPUT_OF_SPLIT);
  add_shared(&sums, own, row, place, n_sharing);
  let end_k = end_outlier(row);
  for (var k = first_alone(own, row) + place; k < end_k; k += n_sharing) {
    let outlier = outliers[k];
    for (var t = 0u; t < tokens; t++) { sums[t] += outlier_product(outlier, t, split, row); }
  }
  return sums;
}

// What an outlier of the row adds, the row's scale apart; nothing if it is another split's to add.
fn outlier_product(outlier: u32, token: u32, split: u32, row: Row) -> f32 {
  let column = outlier_column(outlier);
  if (INPUT_OF_SPLIT && !in_split(column, split)) { return 0.0; }
  return outlier_value(outlier, row_raw_bits(row)) * activation(token, column);
}

fn add_blocks(sums: ptr<function, Sums>, s: ptr<function, Stream>, segment: u32, raw: u32) {
  let end = first_block(segment + 1u);
  for (var block = first_block(segment); block < end; block++) {
    let a = decode16(s, raw);
    if (tokens == 1u) { clear_rest(s); }  // measured for one token alone
    let b = decode16(s, raw);
    if (tokens == 1u) { clear_rest(s); }
    for (var t = 0u; t < tokens; t++) { (*sums)[t] += block_dot(a, b, t, block, weight_offset(raw)); }
  }
}

fn in_split(column: u32, split: u32) -> bool {
  let block = column / 32u;
  let segment = split * segments_per_group;
  return block >= first_block(segment) && block < first_block(segment + segments_per_group);
}
