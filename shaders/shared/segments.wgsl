// A workgroup of 32 rows by segments_per_group column segments: the sums of a row's segments added up. The importer
// provides  fn store_y(i, value)  for y, f32 (splits, tokens, y_rows),  fn product_scale(row)  and  params.rows, params.y_rows.

override segments_per_group: u32;
override partials: u32;  // 32 * segments_per_group, the lanes

var<workgroup> partial: array<f32, partials>;

// To be called by all lanes; `index` is the lane's row here, `local` (row of the tile, segment of the group).
fn write_sums(sums: Sums, row: Row, index: u32, local: vec2<u32>, split: u32) {
  let lane = 32u * local.y + local.x;
  for (var t = 0u; t < tokens; t++) {
    partial[lane] = sums[t];
    workgroupBarrier();
    if (local.y == 0u && index < params.rows) {
      var sum = 0.0;
      for (var i = 0u; i < segments_per_group; i++) { sum += partial[32u * i + local.x]; }
      store_y((split * tokens + t) * params.y_rows + matrix_row(row), sum * product_scale(row));
    }
    workgroupBarrier();
  }
}
