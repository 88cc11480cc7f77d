// A coded matrix in GPU memory: what every kernel that decodes weights is given.

// The importer provides params.n_blocks and params.n_segments.

// A row's blocks of 32 columns are shared out evenly among its segments: where the share of one begins.
fn first_block(segment: u32) -> u32 { return segment * params.n_blocks / params.n_segments; }

override narrow_raw_bits: u32;  // of narrow classes, which are the first: at most raw_bits, which all others have

// Rows lie sorted by class, so that all of a tile have one decode table and one number of raw bits.
struct Row {
  bit: u32,             // where the row's stream starts in `words`
  place: u32,           // which row of the matrix it is | class << 28 | 1 << 31 if that is narrow
  first_outlier: u32,   // into `outliers`
  scale_outliers: u32,  // scale_log2 + 1024 in the high half, the number of outliers in the low one
}

fn matrix_row(row: Row) -> u32 { return row.place & 0x0FFFFFFFu; }

// Of the class's decode table, in `table`.
fn first_entry(row: Row) -> u32 { return extractBits(row.place, 28u, 3u) * n_states; }

// Whether its raw bits are narrow_raw_bits, and those are not raw_bits too.
fn is_narrow(row: Row) -> bool { return narrow_raw_bits < raw_bits && row.place >= 0x80000000u; }

fn row_raw_bits(row: Row) -> u32 { return select(raw_bits, narrow_raw_bits, is_narrow(row)); }

fn end_outlier(row: Row) -> u32 { return row.first_outlier + (row.scale_outliers & 0xFFFFu); }

// 2^(scale_log2 / 8), put together from its bits, as exp2 may round otherwise; -1024 stands for 0.
fn row_scale(row: Row) -> f32 {
  let k = row.scale_outliers >> 16u;
  var mantissa = array<u32, 8>(0x000000u, 0x0B95C2u, 0x1837F0u, 0x25FED7u, 0x3504F3u, 0x45672Au, 0x5744FDu, 0x6AC0C7u);
  return select(0.0, bitcast<f32>((((k >> 3u) - 1u) << 23u) | mantissa[k & 7u]), k > 0u);
}

// An outlier is what the symbol range had to cut off: column in the low half, signed remainder (unit 2^raw) in the high.
fn outlier_column(outlier: u32) -> u32 { return outlier & 0xFFFFu; }
fn outlier_value(outlier: u32, raw: u32) -> f32 { return f32((bitcast<i32>(outlier) >> 16u) << raw); }
