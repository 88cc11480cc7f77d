// A coded matrix in GPU memory: what every kernel that decodes weights is given.

struct Row {
  bit: u32,            // where the row's stream starts in `words`
  scale: f32,
  first_outlier: u32,  // into `outliers`
  n_outliers: u32,
}

// An outlier is what the symbol range had to cut off: column in the low half, signed remainder (unit 2^raw_bits) in the high.
fn outlier_column(outlier: u32) -> u32 { return outlier & 0xFFFFu; }
fn outlier_value(outlier: u32) -> f32 { return f32((bitcast<i32>(outlier) >> 16u) << raw_bits); }
