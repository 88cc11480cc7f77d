// A workgroup's share of W x: lane = row of a 32-row tile, workgroup row = column segment.
// Beside it stand ans.wgsl, stream.wgsl, matrix.wgsl, table.wgsl, sums.wgsl, dot.wgsl, segments.wgsl; and input.wgsl, or
// input_made.wgsl with what tells it of what.

// Outliers of a tile that all lanes share, whichever rows they are of, so that none waits for one after another; 0: a row's are
// left to the row's lanes. For one token; MOST_SHARED a lane at most.
override shared_outliers: u32;
override products_size: u32 = max(shared_outliers, 1u);

const MOST_SHARED = 16u;

var<workgroup> products: array<f32, products_size>;  // of shared outliers with what they multiply

// The row's segment times every token, the row's scale apart; `tile` and `split` are the workgroup's, `local` the lane's (row of
// the tile, segment of the workgroup).
fn segment_product(tile: u32, split: u32, local: vec2<u32>, row: Row) -> Sums {
  let lane = 32u * local.y + local.x;
  let segment = split * segments_per_group + local.y;
  let entry = entries[segment * params.rows_padded + tile * 32u + local.x];
  let v = begin_input(split, lane);
  // The stream is on its way before the table, which all must wait for.
  var s = open_stream(row.bit, entry / n_states, entry & (n_states - 1u), 0u);
  let first_row = row_info[tile * 32u];
  let shared_end = min(end_outlier(row_info[min(tile * 32u + 31u, params.rows - 1u)]), first_row.first_outlier + shared_outliers);
  let own = load_shared(lane, first_row.first_outlier, shared_end);
  load_table(lane, 32u * segments_per_group, first_entry(first_row));
  end_input(v, lane);
  multiply_shared(own, lane, split, first_row, shared_end);
  var sums = Sums();
  if (is_narrow(row)) {
    add_blocks(&sums, &s, segment, narrow_raw_bits);
  } else {
    add_blocks(&sums, &s, segment, raw_bits);
  }
  // The row's segments share its outliers, wherever these are; or those of the workgroup, if it knows no other input.
  let end_k = end_outlier(row);
  let step = select(params.n_segments, segments_per_group, INPUT_OF_SPLIT);
  var k = row.first_outlier + select(segment, local.y, INPUT_OF_SPLIT);
  if (shared_outliers > 0u) {
    workgroupBarrier();
    for (; k < min(end_k, shared_end); k += step) { sums[0] += products[k - first_row.first_outlier]; }
  }
  for (; k < end_k; k += step) {
    let outlier = outliers[k];
    for (var t = 0u; t < tokens; t++) { sums[t] += outlier_product(outlier, t, split, row); }
  }
  return sums;
}

// The lane's share of the tile's outliers from `first` on, every n_lanes-th: all on their way before the first has come.
fn load_shared(lane: u32, first: u32, end: u32) -> array<u32, MOST_SHARED> {
  let n_lanes = 32u * segments_per_group;
  var own: array<u32, MOST_SHARED>;
  for (var i = 0u; i < MOST_SHARED; i++) {
    if (i * n_lanes < shared_outliers) {
      let k = first + i * n_lanes + lane;
      if (k < end) { own[i] = outliers[k]; }
    }
  }
  return own;
}

// A barrier later they are in `products`. A tile's rows have as many raw bits as its first.
fn multiply_shared(own: array<u32, MOST_SHARED>, lane: u32, split: u32, first_row: Row, end: u32) {
  let n_lanes = 32u * segments_per_group;
  for (var i = 0u; i < MOST_SHARED; i++) {
    if (i * n_lanes < shared_outliers) {
      let at = i * n_lanes + lane;
      if (first_row.first_outlier + at < end) { products[at] = outlier_product(own[i], 0u, split, first_row); }
    }
  }
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
