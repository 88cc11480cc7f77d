// A workgroup of 32 rows by segments_per_group column segments: the sums of a row's segments added up. The importer
// provides  fn store_y(i, value)  for y, f32 (splits, tokens, y_rows),  fn product_scale(row)  and  params.rows, params.y_rows.

override segments_per_group: u32;
override at_once: u32;   // tokens whose sums there is room for, at most segments_per_group
override partials: u32;  // at_once * 32 * segments_per_group

var<workgroup> partial: array<f32, partials>;  // (at_once, lanes)

// To be called by all lanes; `index` is the lane's row here, `local` (row of the tile, segment of the group).
fn write_sums(sums: Sums, row: Row, index: u32, local: vec2<u32>, split: u32) {
  let lanes = 32u * segments_per_group;
  for (var first = 0u; first < tokens; first += at_once) {
    for (var t = 0u; t < at_once && first + t < tokens; t++) {
      partial[lanes * t + 32u * local.y + local.x] = sums[first + t];
    }
    workgroupBarrier();
    // A token's by the lanes of one segment.
    let t = first + local.y;
    if (local.y < at_once && t < tokens && index < params.rows) {
      var sum = 0.0;
      for (var i = 0u; i < segments_per_group; i++) { sum += partial[lanes * local.y + 32u * i + local.x]; }
      store_y((split * tokens + t) * params.y_rows + matrix_row(row), sum * product_scale(row));
    }
    workgroupBarrier();
  }
}
