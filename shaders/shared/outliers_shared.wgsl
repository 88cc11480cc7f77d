// The outliers of a tile, which lie together: every lane multiplies some, whichever rows they are of, before weights are decoded, and
// a row's lanes add up the products. So none waits for one far load after another, as in the place of outliers.wgsl a heavy
// row's do. For one token.

override shared_outliers: u32;  // of a tile, MOST_OWN a lane at most; what is beyond is left to its row

const MOST_OWN = 16u;

struct OwnOutliers {
  first: u32,  // of those that are shared
  end: u32,
  values: array<u32, MOST_OWN>,  // every n_lanes-th of them
}

var<workgroup> outlier_products: array<f32, shared_outliers>;

// All on their way before the first has come.
fn begin_outliers(tile: u32, lane: u32) -> OwnOutliers {
  let n_lanes = 32u * segments_per_group;
  let first = row_info[tile * 32u].first_outlier;
  let end = end_outlier(row_info[min(tile * 32u + 31u, params.rows - 1u)]);
  var own = OwnOutliers(first, min(end, first + shared_outliers), array<u32, MOST_OWN>());
  for (var i = 0u; i < MOST_OWN; i++) {
    if (i * n_lanes < shared_outliers) {
      let k = first + i * n_lanes + lane;
      if (k < own.end) { own.values[i] = outliers[k]; }
    }
  }
  return own;
}

// After end_input.
fn end_outliers(own: OwnOutliers, tile: u32, split: u32, lane: u32) {
  let n_lanes = 32u * segments_per_group;
  let row = row_info[tile * 32u];  // all of a tile have as many raw bits
  for (var i = 0u; i < MOST_OWN; i++) {
    if (i * n_lanes < shared_outliers) {
      let at = i * n_lanes + lane;
      if (own.first + at < own.end) { outlier_products[at] = outlier_product(own.values[i], 0u, split, row); }
    }
  }
}

// To be called by all lanes; of n of a row's lanes each adds some.
fn add_shared(sums: ptr<function, Sums>, own: OwnOutliers, row: Row, place: u32, n: u32) {
  workgroupBarrier();
  let end = min(end_outlier(row), own.end);
  for (var k = row.first_outlier + place; k < end; k += n) { (*sums)[0] += outlier_products[k - own.first]; }
}

// From which on a row's outliers are its own lanes'.
fn first_alone(own: OwnOutliers, row: Row) -> u32 { return max(row.first_outlier, own.end); }
