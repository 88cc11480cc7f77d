// A tile's outliers are left to the rows that they are of (product.wgsl). In its place outliers_shared.wgsl has all lanes share them.

alias OwnOutliers = u32;  // nothing

fn begin_outliers(tile: u32, lane: u32) -> OwnOutliers { return 0u; }
fn end_outliers(own: OwnOutliers, tile: u32, split: u32, lane: u32) {}
fn add_shared(sums: ptr<function, Sums>, own: OwnOutliers, row: Row, place: u32, n: u32) {}

// From which on a row's outliers are its own lanes'.
fn first_alone(own: OwnOutliers, row: Row) -> u32 { return row.first_outlier; }
